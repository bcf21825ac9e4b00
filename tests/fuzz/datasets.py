"""Targets: what data sets are read from. A row that is read is kept or dropped, and what is kept can be read again."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exvideo_train.clips.container import UnreadableClip, read_member
from exvideo_train.clips.manifest import _drop_line
from exvideo_train.clips.record import ClipRecord, make_clip_id, parse_record, read_manifest
from exvideo_train.clips.shards import FOLDER, DamagedShard, iter_members
from exvideo_train.clips.sorting import clip_row
from exvideo_train.clips.sources.base import KEPT_REASONS, MALFORMED_ROW, VIDEO_SUFFIXES, Dropped, RawRows, Source
from exvideo_train.clips.sources.folder import CaptionedFolder, CaptionTable
from exvideo_train.clips.sources.internvid import InternVid
from exvideo_train.clips.sources.panda70m import Panda70M
from exvideo_train.clips.sources.video_index import VideoIndex, build_video_index
from exvideo_train.clips.sources.webdataset import WebDataset
from exvideo_train.errors import UserError
from fuzz.mutations import NASTY, PIECES, Mutator, dumps
from fuzz.running import Case, Rows, Target

CAPTION = "a rabbit comes out of its hole, 'yawns' and [slowly] looks at \"us\" – twice 🐇"
VIDEO_IDS = ("aaaaaaaaaaa", "b-_bbbbbbbb", "ccccccccccc")
INTERNVID_ROWS = [
    {
        "YoutubeID": video_id,
        "Start_timestamp": f"00:00:0{number}.500",
        "End_timestamp": f"00:01:0{number}.250",
        "Caption": CAPTION,
        "Aesthetic_Score": 5.25 + number,
        "UMT_Score": 0.4375,
    }
    for number, video_id in enumerate(VIDEO_IDS)
]
PANDA_COLUMNS = ["videoID", "url", "timestamp", "caption", "matching_score", "desirable_filtering"]
PANDA_ROW = [
    VIDEO_IDS[0],
    "https://example.org/watch?v=aaaaaaaaaaa",
    "[['0:00:08.123', '0:00:12.456'], ['0:00:14.000', '0:00:20.500']]",
    "['a rabbit in a meadow', \"it's a fox, or two\"]",
    "[0.4375, 0.5]",
    "['desirable', '1_low_desirable_score']",
]
TABLE_ROWS = [
    {"video": "a.mp4", "caption": CAPTION, "start_seconds": 1.5, "end_seconds": "00:00:05.5", "aesthetic": 5.5},
    {"video": "below/b.mkv", "caption": "words", "start_seconds": "", "end_seconds": "", "umt": "0.5"},
]
SIDECAR = {
    "caption": CAPTION,
    "matching_score": [0.5],
    "aesthetic_score": 5.5,
    "clips": [["00:00:01.000", "00:00:05.000"]],
    "yt_meta_dict": {"info": {"title": "a title", "width": 1280}},
}
RECORDS = [
    ClipRecord(make_clip_id("t", "1", 0, None), "t", "/videos/1.mp4", 0.0, None, CAPTION),
    ClipRecord(make_clip_id("t", "2", 1, 5), "t", "a.tar::2.mp4", 1.0, 5.0, "x", {"umt": 0.5}, 25.0, 1280, 720, 4.0),
    ClipRecord(make_clip_id("t", "3", 1, 5), "t", "3.mp4", 1.0, 5.0, "", {}, 25.0, 1280, 720, 4.0, "h264", 12.5),
]


def check_entries(entries: list[ClipRecord | Dropped]) -> Rows:
    """What a source gives can be sorted, written and read again."""
    kept = dropped = 0
    for entry in entries:
        if isinstance(entry, ClipRecord):
            kept += 1
            text = clip_row(entry)[-1]
            assert "\n" not in text, "a line of the manifest holds a line break"
            # Written as build_manifest writes it.
            assert parse_record(text.encode().decode(), Path("/"), 1) == entry, "a clip is not read as it was written"
        else:
            dropped += entry.reason not in KEPT_REASONS
            line = _drop_line(entry)
            assert json.loads(line)["reason"] == entry.reason
            assert len(line) < 50_000, "a drop's line is longer than what was dropped deserves"
    return Rows(kept, dropped)


@dataclass(frozen=True)
class Written:
    """What a mutated metadata file holds: rows at least, and clips at least, of the rows that were left as they are."""

    rows: int = 0
    clips: int = 0


def _rows_of(source: Source, one_each: bool, written: Written) -> Rows:
    """Every row by itself: it gives clips, or one reason why not, and of malformed ones nothing else."""
    kept = dropped = found = 0
    for piece in source.pieces():
        found += len(piece.rows) + len(piece.dropped)
        dropped += check_entries(list(piece.dropped)).dropped
        for row in piece.rows:
            entries = list(source.parse(RawRows(piece.where, [row], 0)))
            rows = check_entries(entries)
            assert rows.kept + rows.dropped >= 1, "a row is silently absent"
            assert rows.kept + rows.dropped == 1 or not one_each, "one row counts as several"
            malformed = [entry for entry in entries if isinstance(entry, Dropped) and entry.reason == MALFORMED_ROW]
            assert not malformed or len(entries) == 1, "of a malformed row a part is used"
            kept, dropped = kept + rows.kept, dropped + rows.dropped
    assert found >= written.rows, f"{found} rows of {written.rows}"
    assert kept >= written.clips, "a bad row costs its neighbours"
    return Rows(kept, dropped)


def _index(folder: Path) -> VideoIndex:
    videos = folder / "videos"
    videos.mkdir()
    for name in (*VIDEO_IDS[:2], f"{VIDEO_IDS[0]}_00-00-08.123_00-00-12.456", "nan", "[]"):
        (videos / f"{name}.mp4").write_bytes(b"x")
    # Found, and refused.
    (videos / f"{VIDEO_IDS[2]}.mp4").symlink_to("/etc/passwd")
    return build_video_index(videos, folder / "index")


def _json_lines(path: Path, examples: list[dict[str, Any]], clips: list[int], mutator: Mutator) -> Written:
    """Write lines of which one or all are mutated; `clips` are those of each example."""
    number, chosen = mutator.among(examples)
    lines = [dumps(example).encode() for example in examples]
    if mutator.chance.randrange(4):
        lines[number] = mutator.json(chosen)
        content, least = b"\n".join(lines) + b"\n", sum(clips) - clips[number]
    else:
        content, least = mutator.data(b"\n".join(lines) + b"\n", 6), 0
    path.write_bytes(content)
    return Written(sum(bool(line.strip()) for line in content.split(b"\n")), least)


def internvid(folder: Path) -> Case:
    index, path = _index(folder), folder / "M.jsonl"

    def case(mutator: Mutator) -> Rows:
        written = _json_lines(path, INTERNVID_ROWS, [1, 1, 0], mutator)
        source = InternVid(str(path), index, mutator.chance.choice([None, True, False]))
        return _rows_of(source, True, written)

    return case


def _csv(path: Path, columns: list[str], example: list[Any], clips: int, mutator: Mutator) -> Written:
    """Write a header and three rows, one mutated as values or all as bytes; `clips` are those of the example."""
    rows = [example, [*example], example]
    by_value = mutator.chance.randrange(3)
    if by_value:
        if mutator.chance.randrange(2):
            rows[1] = mutator.value(example)
        else:
            place, text = mutator.among(example)
            rows[1][place] = mutator.text(str(text))
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(columns)
    writer.writerows([entry if isinstance(entry, str) else dumps(entry) for entry in row] for row in rows)
    content = stream.getvalue().encode("utf-8", "surrogatepass")
    path.write_bytes(content if by_value else mutator.data(content, 6))
    return Written(sum(bool(row) for row in rows), 2 * clips) if by_value else Written()


def panda70m(folder: Path) -> Case:
    index, path = _index(folder), folder / "M.csv"

    def case(mutator: Mutator) -> Rows:
        written = _csv(path, PANDA_COLUMNS, PANDA_ROW, 2, mutator)
        source = Panda70M(str(path), index, mutator.chance.choice([None, True, False]))
        return _rows_of(source, False, written)

    return case


def caption_table(folder: Path) -> Case:
    (folder / "below").mkdir()
    for name in ("a.mp4", "below/b.mkv"):
        (folder / name).write_bytes(b"x")
    columns = list(TABLE_ROWS[0])

    def case(mutator: Mutator) -> Rows:
        if mutator.chance.randrange(2):
            path = folder / "M.csv"
            written = _csv(path, columns, list(TABLE_ROWS[0].values()), 1, mutator)
        else:
            path = folder / "M.jsonl"
            written = _json_lines(path, TABLE_ROWS, [1, 1], mutator)
        return _rows_of(CaptionTable(str(path), None, "video", "caption"), True, written)

    return case


def captioned_folder(folder: Path) -> Case:
    """Captions and sidecars beside videos of good and of strange names, as plain folder and as video2dataset's."""

    def case(mutator: Mutator) -> Rows:
        videos = folder / "videos"
        shutil.rmtree(videos, ignore_errors=True)
        videos.mkdir()
        names = ["a.mp4", "b.v1.mkv"]
        if not mutator.chance.randrange(4):
            names.append(_file_name(mutator, videos))
        for name in names:
            path = videos / name
            path.write_bytes(b"x")
            if len(os.fsencode(name)) < 200:
                path.with_suffix(".txt").write_bytes(mutator.data(CAPTION.encode()))
                path.with_suffix(".json").write_bytes(mutator.json(SIDECAR))
        listed = sum(name.lower().endswith(VIDEO_SUFFIXES) and name[0] != "." for name in os.listdir(videos))
        total = Rows()
        for source in (CaptionedFolder(str(videos)), WebDataset(str(videos))):
            rows = check_entries([entry for piece in source.pieces() for entry in source.parse(piece)])
            assert rows.kept >= 2, "a video with a strange caption is lost"
            assert rows.kept + rows.dropped >= listed, "a video is silently absent"
            total = Rows(total.kept + rows.kept, total.dropped + rows.dropped)
        return total

    return case


def _file_name(mutator: Mutator, folder: Path) -> str:
    """A name that the file system takes."""
    text = str(mutator.chance.choice(NASTY)) if mutator.chance.randrange(2) else mutator.text("clip.v1")
    content = text.encode("utf-8", "surrogatepass").replace(b"/", b":").replace(b"\0", b"") + b".mp4"
    return os.fsdecode(content[-255:])


_TAR_FIELDS = (
    *((0, 100), (100, 108), (108, 116), (116, 124), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265)),
    *((265, 297), (329, 345), (345, 500), (482, 483)),
)


def tar_of(members: list[tuple[str, bytes]], pax: dict[str, str], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A shard, without the padding of its end."""
    content = b""
    for name, data in members:
        member = tarfile.TarInfo(name)
        member.size, member.pax_headers = len(data), dict(pax)
        content += member.tobuf(format, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)
    return content + bytes(1024)


def _shard(mutator: Mutator) -> bytes:
    chance = mutator.chance
    members = [
        *(("0.mp4", b"x" * 600), ("0.txt", CAPTION.encode()), ("0.json", dumps(SIDECAR).encode())),
        *(("long/" * 25 + "1.v1.mkv", b"y"), ("1.txt", b"words"), ("a folder/", b""), ("2.mp4", b"")),
    ]
    kind, pax, format = chance.randrange(5), {}, chance.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    if kind == 0:
        members[1] = "0.txt", mutator.data(members[1][1])
        members[2] = "0.json", mutator.json(SIDECAR)
    if kind == 1:
        number, (name, data) = mutator.among(members)
        members[number] = mutator.text(name).encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"), data
    if kind == 2:
        format = tarfile.PAX_FORMAT
        key = chance.choice(["size", "path", "linkpath", "mtime", "GNU.sparse.name", "GNU.sparse.size", "x"])
        pax[key] = str(chance.choice(NASTY)).encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    content = tar_of(members, pax, format)
    return _with_changed_headers(mutator, content) if kind == 3 else mutator.data(content) if kind == 4 else content


def _with_changed_headers(mutator: Mutator, content: bytes) -> bytes:
    """Fields of headers with other values, and a sum that is right again."""
    chance, changed = mutator.chance, bytearray(content)
    headers = [start for start in range(0, len(content), 512) if content[start + 257 : start + 262] == b"ustar"]
    for _ in range(chance.randint(1, 2)):
        start = chance.choice(headers)
        begin, end = chance.choice(_TAR_FIELDS)
        size = end - begin
        number = chance.choice([0, 1, 511, 512, 513, 2**20 + 1, 2**31, 2**33 - 1, 2**60])
        value = [
            f"{number:o}".encode()[-size + 1 :] + b"\0",
            b"\x80" + number.to_bytes(12, "big")[-size + 1 :],
            b"\xff" * size,
            chance.choice(PIECES),
            chance.choice([b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"V", b"D"]),
            mutator.data(content[start + begin : start + end]),
        ][chance.randrange(6)]
        changed[start + begin : start + end] = value[:size].ljust(size, b"\0")
        header = changed[start : start + 512]
        changed[start + 148 : start + 156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    return bytes(changed)


def tar_shard(folder: Path) -> Case:
    numbers = iter(range(10**9))

    def case(mutator: Mutator) -> Rows:
        # Each under a name of its own: what is in a shard is remembered by name, size and time.
        shard = folder / f"{next(numbers)}.tar"
        shard.write_bytes(_shard(mutator))
        try:
            return _check_shard(shard)
        finally:
            shard.unlink()

    return case


def _check_shard(shard: Path) -> Rows:
    size, videos = shard.stat().st_size, 0
    with open(shard, "rb") as stream, suppress(DamagedShard):
        for member in iter_members(stream.fileno()):
            assert member.offset + member.size <= size, "a member leaves its shard"
            videos += member.name.lower().endswith(VIDEO_SUFFIXES) and member.kind != FOLDER
    source = WebDataset(str(shard))
    entries = [entry for piece in source.pieces() for entry in source.parse(piece)]
    rows = check_entries(entries)
    accounted = rows.kept + sum(
        isinstance(entry, Dropped) and entry.reason not in KEPT_REASONS and entry.video.lower().endswith(VIDEO_SUFFIXES)
        for entry in entries
    )
    assert accounted == videos, f"{accounted} of {videos} videos are kept or dropped"
    for entry in entries:
        if isinstance(entry, ClipRecord):
            with suppress(UnreadableClip):
                read_member(str(shard), entry.video.partition(".tar::")[2])
    return rows


def manifest(folder: Path) -> Case:
    path = folder / "clips.jsonl"
    examples = [json.loads(record.to_json()) for record in RECORDS]

    def case(mutator: Mutator) -> Rows:
        _json_lines(path, examples, [1] * 3, mutator)
        records = list(read_manifest(path))
        lines = re.split(r"\r\n|\r|\n", path.read_bytes().decode())
        assert len(records) == sum(bool(line.strip()) for line in lines), "a line is silently absent"
        for record in records:
            assert parse_record(record.to_json(), Path("/"), 1) == record, "a clip is not read as it was written"
        return Rows(len(records))

    return case


def _target(prepare: Callable[[Path], Case], cases: int) -> Target:
    return Target(prepare.__name__, (UserError,), prepare, cases)


TARGETS = [
    _target(internvid, 20_000),
    _target(panda70m, 20_000),
    _target(caption_table, 15_000),
    _target(captioned_folder, 8_000),
    _target(tar_shard, 15_000),
    _target(manifest, 15_000),
]
