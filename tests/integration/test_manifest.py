"""build_manifest and filter_clips as users call them: every source, then the filter, and users' mistakes."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from exvideo_train.clips.reader import read_frames
from exvideo_train.clips.record import read_manifest
from exvideo_train.geometry import Geometry

BUILD, FILTER = "data_prep/build_manifest.py", "data_prep/filter_clips.py"
SPAN = ("00:00:00.000", "00:00:05.280")


@pytest.fixture
def data(clip_path: Path, tmp_path: Path) -> Path:
    """One video as every data set would have it."""
    (tmp_path / "videos").mkdir()
    shutil.copy(clip_path, tmp_path / "videos" / "abcdefghijk.mp4")
    (tmp_path / "videos" / "abcdefghijk.txt").write_text("a rabbit in a meadow")
    row = {"YoutubeID": "abcdefghijk", "Start_timestamp": SPAN[0], "End_timestamp": SPAN[1]}
    scores = {"Aesthetic_Score": 4.5, "UMT_Score": 0.4}
    lines = [{**row, "Caption": "a rabbit in a meadow", **scores}, {**row, "YoutubeID": "absent_____", "Caption": "x"}]
    (tmp_path / "M.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "M.csv").write_text(
        "videoID,url,timestamp,caption,matching_score\n"
        f"abcdefghijk,u,\"[['{SPAN[0]}', '{SPAN[1]}']]\",\"['a rabbit in a meadow']\",[0.5]\n"
    )
    with tarfile.open(tmp_path / "00000.tar", "w") as shard:
        shard.add(tmp_path / "videos" / "abcdefghijk.mp4", "0000000_00000.mp4")
        shard.add(tmp_path / "videos" / "abcdefghijk.txt", "0000000_00000.txt")
    return tmp_path


SOURCES = {
    "internvid": ["metadata=M.jsonl", "videos=videos"],
    "panda70m": ["metadata=M.csv", "videos=videos"],
    "webdataset": ["videos=00000.tar"],
    "folder": ["videos=videos"],
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_manifest_of_every_source_gives_the_window(source, data, run_command):
    result = run_command([BUILD, f"source={source}", *SOURCES[source], "manifest=clips.jsonl"], cwd=data)
    assert "clips" in result.stdout
    (record,) = read_manifest(data / "clips.jsonl")
    assert (record.source, record.caption) == (source, "a rabbit in a meadow")
    assert (record.fps, record.width, record.height, record.codec) == (25.0, 1280, 720, "h264")
    assert read_frames(record, Geometry(129, 64, 96, 25)).shape == (129, 64, 96, 3)
    left = {"clips.jsonl", "clips.dropped.jsonl", "M.jsonl", "M.csv", "00000.tar", "videos"}
    assert {path.name for path in data.iterdir()} - {"cwd"} == left


def test_building_twice_and_without_probing_gives_the_same_clips(data, run_command):
    for name, probe in (("one", "true"), ("two", "true"), ("three", "false")):
        run_command(
            [BUILD, "source=internvid", *SOURCES["internvid"], f"manifest={name}.jsonl", f"probe={probe}"], cwd=data
        )
    assert (data / "one.jsonl").read_bytes() == (data / "two.jsonl").read_bytes()
    (one,), (three,) = (list(read_manifest(data / f"{name}.jsonl")) for name in ("one", "three"))
    assert one.clip_id == three.clip_id
    assert three.fps is None


def test_the_filter_keeps_the_clip_for_an_experiment_that_it_fits(data, run_command):
    run_command([BUILD, "source=internvid", *SOURCES["internvid"], "manifest=clips.jsonl"], cwd=data)
    result = run_command([FILTER, "+exp=129f", "fps=25", "manifest=clips.jsonl", "output=out/kept.jsonl"], cwd=data)
    assert "kept" in result.stdout
    assert list(read_manifest(data / "out" / "kept.jsonl")) == list(read_manifest(data / "clips.jsonl"))
    page = (data / "out" / "kept.report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    refused = run_command([FILTER, "+exp=129f", "manifest=clips.jsonl", "output=none.jsonl"], cwd=data, status=2)
    assert "error: output=none.jsonl: no clip passes the filters (too_short 1)" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (data / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=internvid", "videos=videos", "manifest=c.jsonl"], "source=internvid needs metadata=..."),
        (["source=internvid", "metadata=M.jsonl", "manifest=c.jsonl"], "source=internvid needs videos=..."),
        (["source=internvid", "metadata=no.jsonl", "videos=videos", "manifest=c.jsonl"], "metadata=no.jsonl does not"),
        (["source=internvid", "metadata=M.jsonl", "videos=nowhere", "manifest=c.jsonl"], "videos=nowhere is not a"),
        (["source=panda70m", "metadata=M.jsonl", "videos=videos", "manifest=c.jsonl"], "has no column videoID"),
        (["source=panda70m", "metadata=M.csv", "videos=cwd", "manifest=c.jsonl"], "videos=cwd holds no video file"),
        (["source=imagenet", "videos=videos", "manifest=c.jsonl"], "imagenet"),
        (["source=folder", "videos=videos", "manifest=videos"], "manifest=videos is a folder"),
        (["source=folder", "videos=videos", "manifest=c.jsonl", "num_workers=-1"], "num_workers=-1"),
        (["source=folder", "videos=videos"], "manifest=..."),
    ],
)
def test_users_mistakes_are_named_without_a_traceback(arguments, message, data, run_command):
    (data / "cwd").mkdir()
    result = run_command([BUILD, *arguments], cwd=data, status=2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(data.glob("*c.jsonl*"))
    assert not list(data.glob(".*"))


def test_a_target_that_cannot_be_written_is_named(data, run_command):
    (data / "file").write_text("")
    for source in ("internvid", "folder"):
        arguments = [BUILD, f"source={source}", *SOURCES[source], "manifest=file/clips.jsonl"]
        result = run_command(arguments, cwd=data, status=2)
        assert "file" in result.stderr
        assert "Traceback" not in result.stderr


def test_help_names_every_option(run_command):
    assert "video_layout" in run_command([BUILD, "--help"]).stdout
    assert "filter.min_motion" in run_command([FILTER, "--help"]).stdout
