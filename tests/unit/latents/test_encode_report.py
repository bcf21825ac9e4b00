import json
from collections import Counter
from dataclasses import asdict

import pytest

from exvideo_train.geometry import Geometry
from exvideo_train.latents.encode_plan import EncodePlan
from exvideo_train.latents.encode_report import Totals, earlier_refusals, make_report, totals_from_json, totals_to_json
from exvideo_train.latents.quarantine import Quarantine


def totals_of(num_encoded, loop_seconds, wait_seconds):
    return Totals(
        num_encoded=num_encoded,
        num_bytes=100 * num_encoded,
        decode_seconds=2.0 * num_encoded,
        encode_seconds=3.0 * num_encoded,
        wait_seconds=wait_seconds,
        loop_seconds=loop_seconds,
        quarantined=Counter(timeout=2),
    )


def test_totals_travel_between_machines():
    totals = [totals_of(4, 20, 1), Totals()]
    assert totals_from_json(json.loads(json.dumps(totals_to_json(totals)))) == totals


def test_report_adds_up():
    plan = EncodePlan(pending=[None] * 20, num_clips=60, num_reused=30, num_held_back=Counter(missing=5), num_later=5)
    totals = [totals_of(10, 50, 1), totals_of(4, 40, 2)]
    report = make_report(plan, totals, 14, Counter(missing=5, timeout=4), 60, [])
    assert report.remaining == 60 - 30 - 14 - 9
    assert report.clips_per_second == 14 / 50
    assert report.projected_seconds == 7 / (14 / 50)
    assert report.wait_share == 3 / 90
    assert report.decode_seconds_per_clip == 2.0
    assert report.bytes_written == 1400
    text = report.describe()
    assert "quarantined  9" in text
    assert "timeout              4" in text
    assert "projected    25 s" in text


def test_cut_captions_are_counted_and_listed():
    plan = EncodePlan(pending=[None] * 3, num_clips=3)
    report = make_report(plan, [], 3, Counter(), 1, [], ["clip_a", "clip_b"])
    assert "2 captions are longer" in report.describe()
    assert asdict(report)["cut_captions"] == ["clip_a", "clip_b"]
    assert "captions" not in make_report(plan, [], 3, Counter(), 1, []).describe()


@pytest.mark.parametrize(
    ("content", "found", "note"),
    [
        (None, {}, ""),
        ('{"refused_by_decord": {"aaa": "corrupt"}}', {"aaa": "corrupt"}, ""),
        ('{"refused_by_decord": {"aaa": 3}}', {}, "refused_by_decord={'aaa': 3}"),
        ("{", {}, "are not listed again"),
    ],
)
def test_refusals_of_the_report_before(tmp_path, capsys, content, found, note):
    quarantine = Quarantine(tmp_path, Geometry(9, 32, 48, 8))
    if content is not None:
        (tmp_path / "reports").mkdir()
        (tmp_path / "reports" / f"encode_{quarantine.geometry.name}.json").write_text(content)
    assert earlier_refusals(quarantine) == found
    assert note in capsys.readouterr().out
