"""Folders that strangers filled: links, pipes, names; nothing outside is read, and nothing is absent in silence."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.attacked_sources import parse_all
from support.attacks import Attack, Ending, attacks, check_ending, dropped, held
from support.videos import make_video

from exvideo_train.build_manifest import make_source
from exvideo_train.clips.manifest import BuildOptions, build_manifest
from exvideo_train.clips.record import read_manifest
from exvideo_train.clips.sources.folder import CaptionedFolder, CaptionTable
from exvideo_train.clips.sources.internvid import InternVid
from exvideo_train.clips.sources.video_index import build_video_index
from exvideo_train.clips.sources.webdataset import WebDataset
from exvideo_train.clips.target import dropped_path
from exvideo_train.config.clips import BuildManifest, SourceKind
from exvideo_train.errors import UserError

SECRET = "a secret of the machine"
SIDECAR, NAME = "unreadable_sidecar", "bad_name"


def linked(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


def named(name: str | bytes, content: str = "x") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = Path(os.fsdecode(os.path.join(os.fsencode(folder), os.fsencode(name))))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return write


def deep(folder: Path) -> None:
    """A tree so deep that its paths are longer than the system opens."""
    here = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(20):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
    finally:
        os.chdir(here)


def bound_socket(folder: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(folder)
        socket.socket(socket.AF_UNIX).bind("good.txt")
    finally:
        os.chdir(here)


def huge(folder: Path) -> None:
    """A caption of a gigabyte that takes no room."""
    (folder / "good.txt").write_text("words " * 10_000)
    os.truncate(folder / "good.txt", 1 << 30)


def both(*writers: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for writer in writers:
            writer(folder)

    return write


# In the folder lies good.mp4; beside the folder outside/ with secret.txt, secret.mp4 and secret.json.
FOLDERS = [
    held("an empty caption", named("good.txt", "")),
    held("a caption that is a link within", both(named("a/x.txt"), linked("good.txt", "a/x.txt"))),
    held("a link to a folder within", both(named("a/x.txt"), linked("b", "a"))),
    held("a link to the folder itself", linked("a", ".")),
    held("a link to the folder above a folder within", both(named("a/x.txt"), linked("a/up", ".."))),
    held("another kind of file", linked("notes.pdf", "../outside/secret.txt")),
    held("a hidden link", linked(".hidden.mp4", "../outside/secret.mp4")),
    dropped(
        "a caption out of the folder",
        linked("good.txt", "../outside/secret.txt"),
        SIDECAR,
        "is a link to",
        "follow_links",
    ),
    dropped("a caption of the machine", linked("good.txt", "/etc/passwd"), SIDECAR, "/etc/passwd"),
    dropped("a caption without an end", linked("good.txt", "/dev/zero"), SIDECAR, "/dev/zero"),
    dropped("a caption that is a loop", linked("good.txt", "good.txt"), SIDECAR, "leads nowhere"),
    dropped("a caption that leads nowhere", linked("good.txt", "none.txt"), SIDECAR, "leads nowhere"),
    dropped("a caption that is a pipe", lambda folder: os.mkfifo(folder / "good.txt"), SIDECAR, "not a regular file"),
    dropped("a caption that is a socket", bound_socket, SIDECAR, "not a regular file"),
    dropped("a caption that is a folder", lambda folder: (folder / "good.txt").mkdir(), SIDECAR, "not a regular file"),
    dropped("a caption of a gigabyte", huge, "cut_caption", "20,000"),
    dropped(
        "a caption that is not UTF-8", lambda folder: (folder / "good.txt").write_bytes(b"caf\xe9"), "damaged_caption"
    ),
    dropped("a video out of the folder", linked("bad.mp4", "../outside/secret.mp4"), "outside", "is a link to"),
    dropped("a video that is a loop", linked("bad.mp4", "bad.mp4"), "missing", "leads nowhere"),
    dropped("a video that is a pipe", lambda folder: os.mkfifo(folder / "bad.mp4"), "not_a_file"),
    dropped("a folder out of the folder", linked("more", "../outside"), "outside", "is a link to"),
    dropped("the whole machine", linked("more", "/"), "outside", "is a link to"),
    dropped("a sibling of the same beginning", linked("bad.mp4", "../data_of_others/secret.mp4"), "outside"),
    dropped(
        "a link within to a link out",
        both(linked("a.txt", "../outside/secret.txt"), linked("good.txt", "a.txt")),
        SIDECAR,
        "outside/secret.txt",
    ),
    dropped("no suffix", named("README"), NAME, "no suffix"),
    dropped("a dot for a suffix", named("clip."), NAME, "no suffix"),
    dropped("a member that is none", named("a.tar::b.mp4"), NAME, "member of a shard"),
    dropped("a folder like a shard and a member", named("x.tar::y/b.mp4"), NAME, "member of a shard"),
    dropped("a path that is too long", deep, "read_error", "too long"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("outside", "data_of_others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "secret.mp4").write_text(SECRET)
        (tmp_path / name / "secret.txt").write_text(SECRET)
        (tmp_path / name / "secret.json").write_text(json.dumps({"caption": SECRET}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.mp4").write_bytes(b"x")
    return tmp_path / "data"


@attacks(FOLDERS)
@pytest.mark.parametrize("kind", [CaptionedFolder, WebDataset], ids=["folder", "webdataset"])
def test_folders(attack: Attack, kind: type[CaptionedFolder] | type[WebDataset], data: Path) -> None:
    attack.content(data)

    def run() -> Mapping[str, str]:
        clips, drops = parse_all(kind(str(data)))
        assert [clip.video for clip in clips] == [str(data / "good.mp4")]
        assert SECRET not in clips[0].caption
        assert "root:" not in clips[0].caption
        return drops

    check_ending(attack, run)


def test_metadata_beside_a_video_that_leads_out_is_not_read(data: Path) -> None:
    (data / "good.json").symlink_to("../outside/secret.json")
    clips, drops = parse_all(WebDataset(str(data)))
    assert [clip.caption for clip in clips] == [""]
    assert [drop.split(":")[0] for drop in drops.values()] == [SIDECAR]


def test_links_are_followed_where_the_user_says_so(data: Path) -> None:
    (data / "good.txt").symlink_to("../outside/secret.txt")
    (data / "more").symlink_to("../outside")
    for kind in (SourceKind.folder, SourceKind.webdataset):
        config = BuildManifest(source=kind, videos=str(data), follow_links=True)
        clips, drops = parse_all(make_source(config, data.parent / "clips.jsonl"))
        assert [(Path(clip.video).name, clip.caption) for clip in clips] == [
            ("good.mp4", SECRET),
            ("secret.mp4", SECRET),
        ]
        assert not drops
    # A device stays what it is.
    (data / "good.txt").unlink()
    (data / "good.txt").symlink_to("/dev/zero")
    assert "not a regular file" in str(parse_all(CaptionedFolder(str(data), True))[1])


def test_a_folder_of_nothing_but_links_says_so(data: Path) -> None:
    (data / "good.mp4").unlink()
    (data / "bad.mp4").symlink_to("../outside/secret.mp4")
    for kind in (CaptionedFolder, WebDataset):
        with pytest.raises(UserError, match=r"videos=.* is a link to .*follow_links=true"):
            parse_all(kind(str(data)))


def rows_naming(path: str) -> str:
    return json.dumps({"path": path, "caption": "words"}) + "\n"


PATHS = [
    held("a file of the folder", "good.mp4"),
    held("a file of the folder, spelled oddly", "./a/..//good.mp4"),
    held("a file of the folder by its whole path", "{data}/good.mp4"),
    held("a link within", "within.mp4"),
    dropped("out by dots", "../outside/secret.mp4", "outside", "videos="),
    dropped("out by dots from a folder that is not", "none/../../outside/secret.mp4", "outside", "videos="),
    dropped("out by a whole path", "{outside}/secret.mp4", "outside", "videos="),
    dropped("a file of the machine", "/etc/passwd", "outside", "videos="),
    dropped("a sibling of the same beginning", "../data_of_others/secret.mp4", "outside"),
    dropped("out by a link", "out.mp4", "outside", "is a link to", "follow_links"),
    dropped("out by a link to a folder", "more/secret.mp4", "outside", "is a link out of", "follow_links"),
    dropped("a pipe", "pipe.mp4", "not_a_file"),
    dropped("the folder itself", ".", "not_a_file"),
    dropped("no such file", "none.mp4", "missing"),
    dropped("a file for a folder", "good.mp4/x.mp4", "missing"),
    dropped("a name of 300 letters", "x" * 300, "missing", "too long"),
    dropped("a path of 10,000 letters", "x/" * 5000, "missing", "too long"),
    dropped("an empty name", "", "malformed_row", "names no video"),
    dropped("a name with a NUL", "a\0.mp4", "malformed_row", "null"),
    dropped("half a character", "\ud83d.mp4", "malformed_row", "surrogates"),
    dropped("a network address", "http://127.0.0.1/x.mp4", "missing"),
    dropped("a protocol of FFmpeg", "concat:good.mp4|/etc/passwd", "missing"),
]


@attacks(PATHS)
@pytest.mark.parametrize("is_given", [True, False], ids=["videos", "beside"])
def test_paths_in_tables(attack: Attack, is_given: bool, data: Path) -> None:
    (data / "within.mp4").symlink_to("good.mp4")
    (data / "out.mp4").symlink_to("../outside/secret.mp4")
    (data / "more").symlink_to("../outside")
    os.mkfifo(data / "pipe.mp4")
    name = attack.content.replace("{data}", str(data)).replace("{outside}", str(data.parent / "outside"))
    table = (data.parent if is_given else data) / "t.jsonl"
    table.write_text(rows_naming("good.mp4") + rows_naming(name))

    def run() -> Mapping[str, str]:
        clips, drops = parse_all(CaptionTable(str(table), str(data) if is_given else None, "path", "caption"))
        assert len(clips) == 1 + (attack.ending is Ending.HELD)
        return drops

    check_ending(attack, run)


def test_a_folder_reached_by_a_link_holds_what_is_in_it(data: Path) -> None:
    (data.parent / "link").symlink_to(data)
    table = data.parent / "t.jsonl"
    table.write_text(rows_naming("good.mp4") + rows_naming(str(data / "good.mp4")))
    clips, drops = parse_all(CaptionTable(str(table), str(data.parent / "link"), "path", "caption"))
    assert len(clips) == 2
    assert not drops
    assert len(parse_all(CaptionedFolder(str(data.parent / "link")))[0]) == 1


def test_links_in_a_folder_of_downloads(data: Path) -> None:
    """A row whose video may not be read is said to be so, not to be missing."""
    (data / "out________.mp4").symlink_to("../outside/secret.mp4")
    os.mkfifo(data / "pipe_______.mp4")
    (data / "more").symlink_to("../outside")
    metadata = data.parent / "M.jsonl"
    row = {"Start_timestamp": "0:00:01", "End_timestamp": "0:00:09", "Caption": "words"}
    ids = ("out________", "pipe_______", "secret", "good")
    metadata.write_text("".join(json.dumps({"YoutubeID": name, **row}) + "\n" for name in ids))
    for follow, expected, num_clips in (
        (False, ["outside", "outside", "not_a_file", "missing"], 1),
        (True, ["not_a_file"], 3),
    ):
        index = build_video_index(data, data.parent / f"index{follow}", follow)
        clips, drops = parse_all(InternVid(str(metadata), index, None))
        assert [drop.split(":")[0] for drop in drops.values()] == expected
        assert len(clips) == num_clips


NAMES = {
    "two lines": b"a\nb.mp4",
    "two lines, spelled": b"a\\nb.mp4",
    "a mark of sorting": b"a\x01b.mp4",
    "a tab": b"a\tb.mp4",
    "not UTF-8": b"\xff\xfe.mp4",
    "a terminal": b"\x1b[2J.mp4",
    "a return": b"a\rb.mp4",
    "dots": b"clip.v1.mp4",
    "quotes": b"'\".mp4",
    "blanks": b" .mp4",
}


def test_names_of_every_kind_are_found_probed_and_come_back(tmp_path: Path) -> None:
    content = make_video(tmp_path / "x.mp4", frames=30).read_bytes()
    (tmp_path / "data" / "x.tar").mkdir(parents=True)
    for name in NAMES.values():
        # In a folder that is named as a shard is.
        (tmp_path / "data" / "x.tar" / os.fsdecode(name)).write_bytes(content)
    for kind in (CaptionedFolder, WebDataset):
        for probe in (True, False):
            manifest = tmp_path / "clips.jsonl"
            options = BuildOptions(probe, num_workers=1, progress=False)
            report = build_manifest(kind(str(tmp_path / "data")), manifest, options)
            records = list(read_manifest(manifest))
            assert {os.fsencode(os.path.basename(record.video)) for record in records} == set(NAMES.values())
            assert report.num_clips == report.num_videos == len(NAMES)
            assert not report.dropped
            assert all((record.codec == "h264") is probe for record in records)


def test_lists_of_drops_stay_small(data: Path) -> None:
    rows = [rows_naming("good.mp4"), rows_naming("x" * 10**6), json.dumps({"path": "y" * 10**6}) + "\n"]
    (data / "t.jsonl").write_text("".join(rows))
    manifest = data.parent / "clips.jsonl"
    source = CaptionTable(str(data / "t.jsonl"), None, "path", "caption")
    report = build_manifest(source, manifest, BuildOptions(probe=False, num_workers=1, progress=False))
    assert report.dropped == {"missing": 1, "malformed_row": 1}
    assert dropped_path(manifest).stat().st_size < 5000


def test_stems_of_captions(tmp_path: Path) -> None:
    """``clip.v1.mp4`` has ``clip.v1.txt``; in WebDataset also ``clip.txt``, which pairs by the name up to a dot."""
    for name in ("a.v1.mp4", "b.v1.mp4", "c.v1.mp4"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("a.v1.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text(f"words of {name}")
    assert [clip.caption for clip in parse_all(CaptionedFolder(str(tmp_path)))[0]] == ["words of a.v1.txt", "", ""]
    captions = [clip.caption for clip in parse_all(WebDataset(str(tmp_path)))[0]]
    assert captions == ["words of a.v1.txt", "words of b.txt", ""]
