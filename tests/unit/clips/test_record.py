"""Manifest lines: round trip, stable ids, messages that name file and line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from exvideo_train.clips.record import ClipRecord, make_clip_id, read_manifest, write_manifest
from exvideo_train.errors import UserError

RECORD = ClipRecord(
    "a" * 32, "internvid", "/videos/x.mp4", 1.5, 9.25, 'says "hi" — 你好', {"umt": 0.5, "aesthetic": 4.0}
)


def test_round_trip(tmp_path):
    probed = replace(
        RECORD, clip_id="b" * 32, end_seconds=None, fps=25.0, width=640, height=360, duration_seconds=9.0, codec="av1"
    )
    path = tmp_path / "clips.jsonl"
    assert write_manifest(path, [RECORD, probed, replace(RECORD, sampling_fps=15.5)]) == 3
    assert list(read_manifest(path)) == [RECORD, probed, replace(RECORD, sampling_fps=15.5)]


def test_ids_tell_source_video_and_span_apart_and_never_change():
    ids = {
        make_clip_id("internvid", "abc", 0.0, 1.0),
        make_clip_id("panda70m", "abc", 0.0, 1.0),
        make_clip_id("internvid", "abd", 0.0, 1.0),
        make_clip_id("internvid", "abc", 0.001, 1.0),
        make_clip_id("internvid", "abc", 0.0, None),
        make_clip_id("internvid", "abc", 0.0, 1.001),
    }
    assert len(ids) == 6
    assert make_clip_id("internvid", "abcdefghijk", 190.567, 195.1) == make_clip_id(
        "internvid", "abcdefghijk", 190.5670001, 195.0999999
    )
    assert make_clip_id("internvid", "abcdefghijk", 190.567, 195.1) == PINNED


# What stores on users' disks are keyed by: if this changes, every one of them is encoded anew.
PINNED = "dbb3e9c9b0acf95157e0e287f690f2e2"


def test_file_names_that_are_not_utf_8_come_back(tmp_path):
    path = tmp_path / "clips.jsonl"
    write_manifest(path, [replace(RECORD, video="/videos/\udcff.mp4")])
    assert next(read_manifest(path)).video == "/videos/\udcff.mp4"


def test_relative_videos_are_beside_the_manifest(tmp_path):
    path = tmp_path / "clips.jsonl"
    write_manifest(path, [replace(RECORD, video="sub/x.mp4")])
    assert next(read_manifest(path)).video == str(tmp_path / "sub" / "x.mp4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_id": None}, "clip_id=None must be text"),
        ({"clip_id": "../../etc"}, "clip_id='../../etc'"),
        ({"video": ""}, "video is empty"),
        ({"start_seconds": "1"}, "start_seconds='1' must be a number"),
        ({"start_seconds": float("nan")}, "start_seconds=nan must be a number"),
        ({"scores": [1]}, "scores=[1]"),
        ({"scores": {"umt": "high"}}, "scores.umt='high'"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"caption": 3}, "caption=3"),
    ],
)
def test_malformed_lines_are_named(change, message, tmp_path):
    path = tmp_path / "clips.jsonl"
    line = json.dumps({**json.loads(RECORD.to_json()), **change})
    path.write_text(RECORD.to_json() + "\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        list(read_manifest(path))
    assert str(caught.value).startswith(f"manifest={path} line 2: ")
    assert message in str(caught.value)


def test_missing_fields_and_broken_lines_are_named(tmp_path):
    path = tmp_path / "clips.jsonl"
    for text, message in (('{"clip_id": "abcd"}', "'source' is missing"), ('{"clip', "not JSON"), ("[1]", "list")):
        path.write_text(text + "\n")
        with pytest.raises(UserError, match=message):
            read_manifest(path)


def test_missing_and_empty_manifests_are_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no clips"):
        read_manifest(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(UserError, match="not UTF-8"):
        read_manifest(tmp_path / "binary.jsonl")


def test_reading_is_streamed(tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_text(RECORD.to_json() + "\nbroken\n")
    records = read_manifest(path)
    assert next(records) == RECORD
    with pytest.raises(UserError, match="line 2"):
        next(records)


def test_captions_of_foreign_manifests_are_cleaned(tmp_path):
    path = tmp_path / "clips.jsonl"
    write_manifest(path, [replace(RECORD, caption="a dog \ud83d\0"), replace(RECORD, caption="x" * 10**6)])
    assert [record.caption for record in read_manifest(path)] == ["a dog", "x" * 20_000]
