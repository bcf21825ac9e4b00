"""Every kind of broken input in one run of encode_latents, beside a clip that is well."""

import json
from pathlib import Path

import pytest
from support.broken import write_broken, write_good
from support.videos import clip_of

from exvideo_train.clips.record import write_manifest
from exvideo_train.geometry import Geometry
from exvideo_train.latents.store import LatentStore

REPOSITORY = Path(__file__).resolve().parents[2]
GEOMETRY = Geometry(9, 64, 96, 25)
TIMEOUT_SECONDS = 840
# Long enough for a healthy clip on a machine that is busy with other things, too short for a decoder that hangs.
CLIP_TIMEOUT_SECONDS = 20

# (kind of file, start and end in seconds) -> the reason that the report must give.
BROKEN = {
    ("cut_off", 0.0, None): "truncated",
    ("zero_bytes", 0.0, None): "empty_file",
    ("text", 0.0, None): "not_video",
    ("audio", 0.0, None): "no_video_stream",
    ("one_frame", 0.0, None): "too_short",
    ("jumping_timestamps", 0.0, None): "bad_timestamps",
    ("intact", 2.0, 1.0): "bad_span",
    ("intact", 30.0, 39.0): "span_past_end",
    ("corrupt_packets", 1.0, None): "corrupt",
    ("unknown_codec", 0.0, None): "unsupported_codec",
    ("forbidden", 0.0, None): "permission",
    ("hang", 0.8, None): "timeout",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A manifest of the broken clips with a good one in their middle; the good clip; reasons by clip id."""
    folder = tmp_path_factory.mktemp("broken")
    good = write_good(folder / "good.mp4")
    records, reasons = [], {}
    for (kind, start, end), reason in BROKEN.items():
        path = folder / f"{kind}.mp4"
        if not path.exists():
            write_broken("intact" if kind == "forbidden" else kind, good, path)
        records.append(clip_of(path, start, end, caption=f"broken: {kind}"))
        reasons[records[-1].clip_id] = reason
    (folder / "forbidden.mp4").chmod(0)
    # "intact" twice: only the part of it that the clip asks for is wrong.
    well = clip_of(good, 0.4, 1.6, caption="a good clip")
    records.insert(6, well)
    write_manifest(folder / "clips.jsonl", records)
    return folder / "clips.jsonl", well, reasons


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_twelve_kinds_of_broken_input(decoder, broken, tiny_model_5b, run_command, tmp_path):
    manifest, well, reasons = broken
    assert len(set(reasons.values())) == len(reasons) == 12
    store = tmp_path / "store"
    command = [
        str(REPOSITORY / "data_prep" / "encode_latents.py"),
        "+exp=demo",
        f"model.path={tiny_model_5b}",
        "num_frames=9",
        f"manifest={manifest}",
        f"latents={store}",
        "device=cpu",
        "decode_workers=2",
        f"decoder={decoder}",
        f"clip_timeout_seconds={CLIP_TIMEOUT_SECONDS}",
    ]
    result = run_command(["tests/support/without_privilege.py", *command], timeout_seconds=TIMEOUT_SECONDS)

    lines = (store / "reports" / f"quarantined_{GEOMETRY.name}.jsonl").read_text().splitlines()
    entries = {entry["clip_id"]: entry for entry in map(json.loads, lines)}
    assert {clip_id: entry["reason"] for clip_id, entry in entries.items()} == reasons
    assert all(entry["detail"] for entry in entries.values())
    report = json.loads((store / "reports" / f"encode_{GEOMETRY.name}.json").read_text())
    assert report["quarantined"] == dict.fromkeys(sorted(reasons.values()), 1)
    assert (report["encoded"], report["remaining"]) == (1, 0)
    for reason in reasons.values():
        assert f"{reason} " in result.stdout

    latents = LatentStore.open(store)
    assert latents.clip_ids(GEOMETRY) == [well.clip_id]
    assert list(latents.clip_ids_on_disk(GEOMETRY)) == [well.clip_id]
    assert latents.read(well.clip_id, GEOMETRY).caption == well.caption
    outside = [path for path in store.rglob("*") if path.is_file() and path.relative_to(store).parts[0] != "reports"]
    # Store, index, empty prompt, one clip.
    assert len(outside) == 4, outside
