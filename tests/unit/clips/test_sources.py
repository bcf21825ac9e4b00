# ruff: noqa: E501
"""Metadata in the exact published formats, into records; and finding their videos among downloaded files."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from exvideo_train.clips.manifest import BuildOptions, build_manifest
from exvideo_train.clips.record import ClipRecord, make_clip_id
from exvideo_train.clips.sources.base import Dropped, Source, parse_timestamp
from exvideo_train.clips.sources.folder import CaptionedFolder, CaptionTable
from exvideo_train.clips.sources.internvid import InternVid
from exvideo_train.clips.sources.panda70m import Panda70M, parse_list, parse_spans
from exvideo_train.clips.sources.video_index import VideoIndex, build_video_index
from exvideo_train.clips.sources.webdataset import WebDataset
from exvideo_train.clips.target import dropped_path
from exvideo_train.errors import UserError

# Lines as the data sets publish them.
INTERNVID = """\
{"YoutubeID": "LLTBpz0hH8g", "Start_timestamp": "00:03:10.567", "End_timestamp": "00:03:17.033", "Caption": "a man is fishing", "Aesthetic_Score": 4.6484375, "UMT_Score": 0.4130859375}
{"YoutubeID": "-0aM99dMu_4", "Start_timestamp": "01:00:00.000", "End_timestamp": "01:00:16.500", "Caption": "waves", "Aesthetic_Score": 5.2, "UMT_Score": 0.31}
{"YoutubeID": "not_there__", "Start_timestamp": "00:00:00.000", "End_timestamp": "00:00:01.000", "Caption": "x", "Aesthetic_Score": 5, "UMT_Score": 0.3}
{"YoutubeID": "LLTBpz0hH8g", "Start_timestamp": "00:03:10.567", "End_timestamp": "00:01:17.033", "Caption": "y"}
{"YoutubeID": "LLTBpz0hH8g", "Start_timestamp": "soon", "End_timestamp": "00:01:17.033", "Caption": "y"}
{"YoutubeID": "LLTBpz0hH8g"
"""
PANDA = """\
videoID,url,timestamp,caption,matching_score
--C66yU3LjM,https://www.youtube.com/watch?v=--C66yU3LjM,"[['0:00:08.123', '0:00:12.456'], ['0:01:00.000', '0:01:20.000']]","['A man is talking.', ""It's a dog, isn't it?""]","[0.437, 0.281]"
missing_one,https://www.youtube.com/watch?v=missing_one,"[['0:00:01.000', '0:00:02.000']]","['x']",[0.5]
--C66yU3LjM,https://www.youtube.com/watch?v=--C66yU3LjM,"[['0:02:00.000', '0:02:20.000']]","['a', 'b']",[0.5]
"""
PANDA_NEWER = """\
videoID,url,timestamp,caption,matching_score,desirable_filtering,shot_boundary_detection
--C66yU3LjM,https://www.youtube.com/watch?v=--C66yU3LjM,"[['0:00:08.123', '0:00:12.456'], ['0:01:00.000', '0:01:20.000']]","['A man.', 'A dog.']","[0.437, 0.281]","['desirable', '2_tiny_camera_movement']","[[['0:00:00.000', '0:00:04.333']], [['0:00:00.000', '0:00:05.005'], ['0:00:05.005', '0:00:20.000']]]"
"""


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def index_of(folder: Path, tmp_path: Path) -> VideoIndex:
    return build_video_index(folder, tmp_path / "index")


def parsed(source: Source) -> tuple[list[ClipRecord], list[Dropped]]:
    entries = [entry for piece in source.pieces() for entry in source.parse(piece)]
    clips = [entry for entry in entries if isinstance(entry, ClipRecord)]
    return clips, [entry for entry in entries if isinstance(entry, Dropped)]


def test_internvid_with_whole_videos(tmp_path):
    metadata = tmp_path / "M.jsonl"
    metadata.write_text(INTERNVID)
    videos = make_files(tmp_path / "videos", "LLTBpz0hH8g.mp4", "deeper/-0aM99dMu_4.webm", "-0aM99dMu_4.json")
    clips, dropped = parsed(InternVid(str(metadata), index_of(videos, tmp_path), None))
    assert clips[0] == ClipRecord(
        clip_id=make_clip_id("internvid", "LLTBpz0hH8g", 190.567, 197.033),
        source="internvid",
        video=str(videos / "LLTBpz0hH8g.mp4"),
        start_seconds=190.567,
        end_seconds=197.033,
        caption="a man is fishing",
        scores={"aesthetic": 4.6484375, "umt": 0.4130859375},
    )
    assert clips[1].video == str(videos / "deeper" / "-0aM99dMu_4.webm")
    assert (clips[1].start_seconds, clips[1].end_seconds) == (3600.0, 3616.5)
    assert [(drop.reason, drop.where.rsplit(":", 1)[1]) for drop in dropped] == [
        ("missing", "3"),
        ("bad_span", "4"),
        ("malformed_row", "5"),
        ("malformed_row", "6"),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "LLTBpz0hH8g_00:03:10.567_00:03:17.033.mp4",
        "LLTBpz0hH8g_00-03-10.567_00-03-17.033.mp4",
        "LLTBpz0hH8g_00_03_10_567-00_03_17_033.mkv",
        "LLTBpz0hH8g_190.567_197.033.mp4",
        "a/LLTBpz0hH8g-190.567-197.033.mp4",
    ],
)
def test_cut_videos_are_recognised_by_the_span_in_their_name(name, tmp_path):
    metadata = tmp_path / "M.jsonl"
    metadata.write_text(INTERNVID)
    videos = make_files(tmp_path / "videos", name, "LLTBpz0hH8g_1.0_2.0.mp4")
    clips, _ = parsed(InternVid(str(metadata), index_of(videos, tmp_path), None))
    assert [(clip.video, clip.start_seconds, clip.end_seconds) for clip in clips] == [(str(videos / name), 0.0, None)]
    # The id is the data set's clip, however its video was downloaded.
    assert clips[0].clip_id == make_clip_id("internvid", "LLTBpz0hH8g", 190.567, 197.033)


def test_cut_videos_named_by_id_alone_when_said_so(tmp_path):
    metadata = tmp_path / "M.jsonl"
    metadata.write_text(INTERNVID)
    videos = make_files(tmp_path / "videos", "LLTBpz0hH8g.mp4")
    clips, _ = parsed(InternVid(str(metadata), index_of(videos, tmp_path), True))
    assert [(clip.start_seconds, clip.end_seconds) for clip in clips] == [(0.0, None)]


@pytest.mark.parametrize("text", [PANDA, PANDA_NEWER])
def test_panda70m(text, tmp_path):
    metadata = tmp_path / "M.csv"
    metadata.write_text(text)
    videos = make_files(tmp_path / "videos", "--C66yU3LjM.mp4")
    clips, dropped = parsed(Panda70M(str(metadata), index_of(videos, tmp_path), None))
    assert [(clip.start_seconds, clip.end_seconds) for clip in clips] == [(8.123, 12.456), (60.0, 80.0)]
    assert clips[0].clip_id == make_clip_id("panda70m", "--C66yU3LjM", 8.123, 12.456)
    assert [clip.scores["matching"] for clip in clips] == [0.437, 0.281]
    if text is PANDA:
        assert [clip.caption for clip in clips] == ["A man is talking.", "It's a dog, isn't it?"]
        assert [(drop.reason, drop.video) for drop in dropped] == [
            ("missing", "missing_one"),
            ("malformed_row", "--C66yU3LjM"),
        ]
        assert "1 timestamps but 2 captions" in dropped[1].detail
    else:
        assert [(clip.scores["desirable"], clip.scores["shots"]) for clip in clips] == [(1.0, 1.0), (0.0, 2.0)]


def test_panda70m_lists_are_read_as_python_reads_them():
    captions = ["plain", "it's", 'says "no"', "back\\slash", "new\nline", "é\U0001f600", "", "a, ['b']"]
    assert parse_list(str(captions)) == captions
    assert parse_list("['one', \"it's\"]") == ["one", "it's"]
    assert parse_list("[]") == []
    assert parse_spans("[['0:00:08.123', '0:00:12.456']]") == [(8.123, 12.456)]
    assert parse_spans("[('0:00:08', '1:00:12.456')]") == [(8.0, 3612.456)]
    for text in ("", "__import__('os')", "[['0:00:08.123']]", "['0:00:08.123', '0:00:09.0']", "{'a': 1}"):
        with pytest.raises(ValueError, match="is not"):
            parse_spans(text)


def test_panda70m_without_its_columns_is_refused(tmp_path):
    metadata = tmp_path / "M.csv"
    metadata.write_text("id,text\n1,x\n")
    videos = make_files(tmp_path / "videos", "1.mp4")
    with pytest.raises(UserError, match=r"has no column videoID, timestamp, caption \(it has: id, text\)"):
        parsed(Panda70M(str(metadata), index_of(videos, tmp_path), None))


def video2dataset(folder: Path) -> None:
    make_files(
        folder, "00000/0000000_00000.mp4", "00000/0000000_00001.mp4", "00001/0000000_00000.mp4", "00000_stats.json"
    )
    (folder / "00000/0000000_00000.txt").write_text("a caption\n")
    sidecar = {"videoID": "--C66yU3LjM", "caption": ["from json"], "matching_score": [0.41], "status": "success"}
    (folder / "00000/0000000_00001.json").write_text(json.dumps(sidecar))
    (folder / "00001/0000000_00000.json").write_text('{"caption": "cut o')


def test_video2dataset_folders(tmp_path):
    video2dataset(tmp_path / "out")
    clips, dropped = parsed(WebDataset(str(tmp_path / "out")))
    cut_off = tmp_path / "out" / "00001" / "0000000_00000"
    assert [(drop.reason, drop.where, drop.video) for drop in dropped] == [
        ("unreadable_sidecar", f"{cut_off}.json", f"{cut_off}.mp4")
    ]
    assert [(Path(clip.video).relative_to(tmp_path).as_posix(), clip.caption, clip.scores) for clip in clips] == [
        ("out/00000/0000000_00000.mp4", "a caption", {}),
        ("out/00000/0000000_00001.mp4", "from json", {"matching": 0.41}),
        ("out/00001/0000000_00000.mp4", "", {}),
    ]
    assert len({clip.clip_id for clip in clips}) == 3


def test_video2dataset_shards_are_listed_in_place(tmp_path):
    video2dataset(tmp_path / "loose")
    out = tmp_path / "out"
    out.mkdir()
    for shard in ("00000", "00001"):
        with tarfile.open(out / f"{shard}.tar", "w") as archive:
            for path in sorted((tmp_path / "loose" / shard).iterdir()):
                archive.add(path, path.name)
    whole = (out / "00000.tar").read_bytes()
    (out / "00002.tar").write_bytes(whole[:700])
    clips, dropped = parsed(WebDataset(str(out)))
    assert [(clip.video, clip.caption) for clip in clips[:3]] == [
        (f"{out}/00000.tar::0000000_00000.mp4", "a caption"),
        (f"{out}/00000.tar::0000000_00001.mp4", "from json"),
        (f"{out}/00001.tar::0000000_00000.mp4", ""),
    ]
    assert len({clip.clip_id for clip in clips}) == len(clips)
    assert [(drop.reason, drop.where) for drop in dropped] == [
        ("unreadable_sidecar", f"{out}/00001.tar::0000000_00000.json"),
        ("corrupt", f"{out}/00002.tar"),
    ]
    single, _ = parsed(WebDataset(str(out / "00001.tar")))
    assert single == [clips[2]]


def test_clips_of_unreadable_sidecars_are_kept_and_counted(tmp_path):
    video2dataset(tmp_path / "out")
    (tmp_path / "out/00000/0000000_00000.json").write_text('["no object"]')
    manifest = tmp_path / "clips.jsonl"
    report = build_manifest(WebDataset(str(tmp_path / "out")), manifest, BuildOptions(probe=False, progress=False))
    assert report.num_clips == 3
    assert report.dropped == {"unreadable_sidecar": 2}
    assert any(line.startswith("clip kept: unreadable_sidecar") for line in report.lines())
    listed = [json.loads(line) for line in dropped_path(manifest).read_text().splitlines()]
    assert [Path(entry["where"]).suffix for entry in listed] == [".json", ".json"]
    assert all("scores are lost" in entry["detail"] for entry in listed)


def test_a_folder_with_captions_beside_the_videos(tmp_path):
    videos = make_files(tmp_path / "v", "a/x.mp4", "b/x.mp4", "b/notes.pdf", "b/.hidden.mp4")
    (videos / "a/x.txt").write_text(" first \n")
    clips, _ = parsed(CaptionedFolder(str(videos)))
    assert [(clip.video, clip.caption) for clip in clips] == [
        (str(videos / "a/x.mp4"), "first"),
        (str(videos / "b/x.mp4"), ""),
    ]
    # Equal stems in different folders never collide.
    assert clips[0].clip_id != clips[1].clip_id


def test_tables_of_paths_and_captions(tmp_path):
    videos = make_files(tmp_path / "v", "x.mp4", "y.mp4")
    table = tmp_path / "t.csv"
    table.write_text('file,text,start_seconds,end_seconds,aesthetic\nx.mp4,"one, two",1.5,0:00:09.5,4.5\nz.mp4,no,,,\n')
    clips, dropped = parsed(CaptionTable(str(table), str(videos), "file", "text"))
    assert [(c.video, c.caption, c.start_seconds, c.end_seconds, c.scores) for c in clips] == [
        (str(videos / "x.mp4"), "one, two", 1.5, 9.5, {"aesthetic": 4.5})
    ]
    assert [drop.reason for drop in dropped] == ["missing"]
    lines = tmp_path / "v" / "t.jsonl"
    lines.write_text(json.dumps({"path": "y.mp4", "caption": "hello"}) + "\n" + json.dumps({"path": "y.mp4"}) + "\n")
    clips, dropped = parsed(CaptionTable(str(lines), None, "path", "caption"))
    assert [(clip.video, clip.caption, clip.end_seconds) for clip in clips] == [(str(videos / "y.mp4"), "hello", None)]
    assert [(drop.reason, drop.detail) for drop in dropped] == [("malformed_row", "column 'caption' is missing")]


def test_what_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"videos=.*nowhere is not a folder"):
        CaptionedFolder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"metadata=.*none\.csv does not exist"):
        CaptionTable(str(tmp_path / "none.csv"), None, "path", "caption")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no video file"):
        parsed(CaptionedFolder(str(tmp_path / "empty")))
    with pytest.raises(UserError, match="neither"):
        parsed(WebDataset(str(tmp_path / "empty")))


def test_the_index_finds_every_file_and_the_first_of_equals(tmp_path):
    names = [f"{number % 7}/{number:05d}.mp4" for number in range(3000)]
    videos = make_files(tmp_path / "v", *names, "0/twice.mp4", "1/twice.mp4", "6/é\udcff.mp4")
    index = index_of(videos, tmp_path)
    assert index.num_files == 3003
    assert all(index.find(Path(name).stem) == str(videos / name) for name in names)
    assert index.find("twice") == str(videos / "0/twice.mp4")
    assert index.find("é\udcff") == str(videos / "6/é\udcff.mp4")
    assert index.find("absent") is None


def test_timestamps():
    assert parse_timestamp("00:03:10.567") == 190.567
    assert parse_timestamp("0:00:08,5") == 8.5
    assert parse_timestamp("10:00:00") == 36000.0
    assert parse_timestamp("03:10.5") == 190.5
    assert parse_timestamp("12.25") == 12.25
    assert parse_timestamp(3) == 3.0
    for wrong in ("", "1:2:3:4", None, [1], True):
        with pytest.raises(ValueError, match="timestamp"):
            parse_timestamp(wrong)
