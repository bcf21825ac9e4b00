"""Filters: each reason on a clip that has it and no other, counts, sidecar, journal, sampling rates, report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exvideo_train.clips import filtering
from exvideo_train.clips.filter_page import FilterPage
from exvideo_train.clips.filtering import FilterReport, filter_manifest
from exvideo_train.clips.judging import FilterOptions, Judged
from exvideo_train.clips.record import read_manifest, write_manifest
from exvideo_train.clips.target import dropped_path, measures_path, report_path
from exvideo_train.config.clips import FilterThresholds
from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry

GEOMETRY = Geometry(17, 96, 144, 8)
OPTIONS = FilterOptions(GEOMETRY, FilterThresholds(), num_workers=2, timeout_seconds=60, progress=False)
HEIGHT, WIDTH = 120, 192


def moving(seed: int, count: int = 60, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(seed)
    picture = rng.integers(20, 235, (height // 12 + 1, (width + count) // 12 + 2, 3), np.uint8)
    picture = picture.repeat(12, 0).repeat(12, 1)
    return np.stack([picture[:height, number : number + width] for number in range(count)])


@pytest.fixture(scope="module")
def clips(video, clip, tmp_path_factory) -> Path:
    """A manifest with a clip for every reason."""
    folder = tmp_path_factory.mktemp("clips")

    def make(name: str, frames: np.ndarray, **settings: object):
        size = frames.shape[1:3]
        return clip(
            video(folder / f"{name}.mp4", frames=list(frames), size=size, **settings), 0.0, None, f"the {name} clip"
        )

    boxed = moving(21)
    boxed[:, :20] = boxed[:, -20:] = 0
    black = moving(22)
    black[:10] = 0
    frozen = moving(23)
    frozen[25:] = frozen[25]
    good = make("good", moving(1))
    records = [
        good,
        make("too_short", moving(2, 40)),
        make("too_small", moving(3, 60, 64, 96)),
        make("aspect", moving(4, 60, 192, 120)),
        make("scene_cut", np.concatenate([moving(5, 30), moving(6, 30)])),
        make("frozen", frozen),
        make("black", black),
        make("letterboxed", boxed),
        make("low_fps", moving(7, 20), fps=5),
        replace(make("caption", moving(8)), caption="two words"),
        replace(make("score_aesthetic", moving(9)), scores={"aesthetic": 3.0}),
        replace(make("score_umt", moving(10)), scores={"umt": 0.1, "aesthetic": 5.0}),
        make("near_duplicate", moving(1), options={"crf": "30"}),
        clip(folder / "missing.mp4", 0.0, None, "the missing clip"),
        replace(good, clip_id="f" * 32, start_seconds=-1.0, end_seconds=3.0),
        replace(good, clip_id="e" * 32, start_seconds=9.0),
        replace(make("second", moving(11)), scores={"aesthetic": 5.0, "unknown": 0.0}),
    ]
    copy = folder / "copy.mp4"
    copy.write_bytes((folder / "good.mp4").read_bytes())
    records.append(replace(clip(copy), caption="the exact_duplicate clip"))
    (folder / "not_video.mp4").write_text("text")
    records.append(clip(folder / "not_video.mp4", 0.0, None, "the not_video clip"))
    records.append(clip(folder / "good.mp4", 0.0, 1.5, "the too_short clip"))
    write_manifest(folder / "clips.jsonl", records)
    return folder / "clips.jsonl"


def reasons_of(output: Path) -> dict[str, str]:
    return {line["video"]: line["reason"] for line in map(json.loads, dropped_path(output).read_text().splitlines())}


def test_every_clip_goes_for_its_own_reason(clips, tmp_path):
    output = tmp_path / "kept.jsonl"
    report = filter_manifest(clips, output, OPTIONS, FilterPage(num_shown=4, seed=0))
    kept = list(read_manifest(output))
    assert [record.caption for record in kept] == ["the good clip", "the second clip"]
    assert (kept[0].fps, kept[0].width, kept[0].height, kept[0].codec) == (25.0, WIDTH, HEIGHT, "h264")
    assert kept[0].duration_seconds == pytest.approx(2.4)
    dropped = [json.loads(line) for line in dropped_path(output).read_text().splitlines()]
    for line in dropped:
        if Path(line["video"]).stem not in ("good", "copy"):
            assert line["reason"] == Path(line["video"]).stem, line
    expected = {Path(line["video"]).stem for line in dropped} - {"good", "copy"}
    expected |= {"bad_span", "span_past_end", "exact_duplicate"}
    assert set(report.first) == expected
    assert report.num_kept + sum(report.first.values()) == report.num_clips == 20
    assert report.first["too_short"] == 2
    page = report_path(output).read_text()
    assert page.count("data:image/jpeg") >= 6
    assert "https://" not in page
    assert re.search(r"<tr><td>scene_cut<td>1<td>5.0%", page)
    assert page.count("data:image/png") >= 9


def test_the_page_shows_markup_and_names_as_text(clip, tmp_path):
    markup = "<script>alert('x')</script>"
    scores = {markup: 1e9, "$x_{$": 0.5, **{f"of a stranger {number}": 0.5 for number in range(60)}}
    record = replace(clip(f"/nowhere/{markup}\udcff\x1b.mp4", 0, 1, markup), scores=scores)
    builder = FilterPage(num_shown=2, seed=0)
    builder.see(Judged(record, [markup], markup), kept=False)
    builder.write(tmp_path / "page.html", OPTIONS, FilterReport())
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5
    assert r"\udcff\x1b.mp4" in page
    assert "$x {$</figcaption>" in page
    assert page.count("data:image/png") == 50
    assert "other scores" in page


def test_the_result_does_not_depend_on_workers_or_on_being_interrupted(clips, tmp_path, monkeypatch):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    filter_manifest(clips, one, replace(OPTIONS, num_workers=1))
    real = filtering.judge_clips

    def interrupted(*arguments):
        for number, judged in enumerate(real(*arguments)):
            if number == 7:
                raise KeyboardInterrupt
            yield judged

    with monkeypatch.context() as patch:
        patch.setattr(filtering, "judge_clips", interrupted)
        with pytest.raises(KeyboardInterrupt):
            filter_manifest(clips, two, OPTIONS)
    assert not two.exists()
    filter_manifest(clips, two, OPTIONS)
    assert one.read_bytes() == two.read_bytes()
    assert dropped_path(one).read_bytes() == dropped_path(two).read_bytes()


def test_other_thresholds_decode_nothing_again(clips, tmp_path, monkeypatch):
    output = tmp_path / "kept.jsonl"
    filter_manifest(clips, output, OPTIONS)
    size = measures_path(output).stat().st_size

    # Workers are new processes: only what is sent to them can tell whether anything was asked for.
    def no_tasks(function, tasks, *rest, **settings):
        for task in tasks:
            assert task is None
            yield None, None

    monkeypatch.setattr("exvideo_train.clips.journal.parallel_map", no_tasks)
    loose = replace(OPTIONS, thresholds=FilterThresholds(max_cuts=9, max_frozen_share=1.0, near_duplicate_distance=-1))
    captions = " ".join(record.caption for record in _kept(clips, output, loose))
    assert "scene_cut" in captions
    assert "frozen" in captions
    assert measures_path(output).stat().st_size == size


def _kept(clips: Path, output: Path, options: FilterOptions):
    filter_manifest(clips, output, options)
    return list(read_manifest(output))


def test_short_clips_may_be_sampled_faster(clips, clip, tmp_path):
    thresholds = FilterThresholds(max_fps=16, near_duplicate_distance=-1)
    kept = _kept(clips, tmp_path / "kept.jsonl", replace(OPTIONS, thresholds=thresholds))
    short = next(record for record in kept if "too_short" in record.caption and record.end_seconds is None)
    # 40 frames at 25 a second are 1.6 s: 16 steps of a tenth.
    assert short.sampling_fps == pytest.approx(10.0)
    assert next(record for record in kept if "good" in record.caption).sampling_fps is None
    from exvideo_train.clips.reader import read_frames

    assert read_frames(short, GEOMETRY).shape == (17, 96, 144, 3)


def test_nothing_kept_is_an_error_that_counts(clips, tmp_path):
    output = tmp_path / "kept.jsonl"
    with pytest.raises(UserError, match=r"no clip passes the filters \(.*too_short"):
        filter_manifest(clips, output, replace(OPTIONS, geometry=Geometry(129, 96, 144, 8)))
    assert not output.exists()
    assert dropped_path(output).exists()
