"""Tar shards as strangers write them: a member costs a member, damage is said, and nothing claims memory."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.attacked_sources import parse_all
from support.attacks import Attack, attacks, check_ending, dropped, held

from exvideo_train.clips.container import UnreadableClip, read_member
from exvideo_train.clips.shards import MAX_HEADER_BYTES, MAX_MEMBER_BYTES
from exvideo_train.clips.sources.webdataset import WebDataset

SIDECAR, NAME = "unreadable_sidecar", "bad_name"
BLOCK = 512


def member(
    name: str | bytes,
    content: bytes = b"x",
    kind: bytes = b"0",
    size: int | bytes | None = None,
    checksum: bytes | None = None,
    prefix: bytes = b"",
) -> bytes:
    """One member, header and content, with whatever is claimed of it."""
    size = len(content) if size is None else size
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    raw = name.encode() if isinstance(name, str) else name
    head = raw.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0"
    tail = kind + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + prefix.ljust(155, b"\0") + bytes(12)
    total = checksum or b"%06o\0 " % (sum(head) + 8 * 32 + sum(tail))
    return head + total + tail + content + bytes(-len(content) % BLOCK)


def pax(**records: str) -> bytes:
    content = b""
    for key, value in records.items():
        body = f" {key.replace('_', '.')}={value}\n".encode()
        length = len(body) + len(str(len(body)))
        length = len(body) + len(str(length))
        content += str(length).encode() + body
    return member("PaxHeader", content, b"x")


def base_256(number: int) -> bytes:
    return bytes([0x80 if number >= 0 else 0xFF]) + number.to_bytes(11, "big", signed=True)


def gnu_sparse(num_maps: int) -> bytes:
    """An old GNU sparse member whose map goes on for so many blocks."""
    head = bytearray(member("bad.mp4", b"", b"S"))
    head[482] = 1
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    maps = b"".join(bytes(504) + bytes([number < num_maps - 1]) + bytes(7) for number in range(num_maps))
    return bytes(head) + maps


LONG = "d/" * 200 + "bad.mp4"

# The attacked bytes stand between the members good.mp4 with good.txt, and last.mp4.
MEMBERS = [
    held("nothing", b""),
    held("a folder", member("folder/", b"", b"5")),
    held("a folder named as a video", member("bad.mp4/", b"", b"5")),
    held("another kind of file", member("bad.npy")),
    held("a device", member("null", b"", b"3", size=10**9)),
    held("a link", member("link", b"", b"2", size=10**9)),
    held("a global header", member("pax_global_header", b"19 comment=whatever\n"[:19] + b"\n", b"g")),
    dropped("a video that is a hard link", member("bad.mp4", b"", b"1"), "not_a_file", "a hard link"),
    dropped("a video that is a link", member("bad.mp4", b"", b"2"), "not_a_file", "a symbolic link"),
    dropped("a video that is a pipe", member("bad.mp4", b"", b"6"), "not_a_file", "a pipe"),
    dropped("a video that is a device", member("bad.mp4", b"", b"4"), "not_a_file", "a device"),
    dropped("a video of an unknown kind", member("bad.mp4", kind=b"Z"), "not_a_file", "unknown kind"),
    dropped("a caption that is a link", member("last.txt", b"", b"2"), SIDECAR, "a symbolic link"),
    dropped("a sparse video", gnu_sparse(1), "not_a_file", "a sparse file"),
    dropped("a sparse video with a long map", gnu_sparse(40), "not_a_file", "a sparse file"),
    dropped(
        "a sparse video by extended header",
        pax(GNU_sparse_major="1", GNU_sparse_realsize=str(10**15)) + member("bad.mp4"),
        "not_a_file",
        "a sparse file",
    ),
    dropped("no suffix", member("README"), NAME, "no suffix"),
    dropped("an empty name", member(""), NAME, "no name"),
    dropped("a suffix alone", member(".mp4"), NAME, "no suffix"),
    dropped("a NUL in the name", pax(path="bad\0.mp4") + member("bad.mp4"), NAME, "NUL"),
    dropped("a shard in the name", member("a.tar::bad.mp4"), NAME, "member of a shard"),
    dropped("a caption twice", member("last.txt") + member("last.txt"), SIDECAR, "again"),
    dropped("a caption that is not UTF-8", member("last.txt", b"caf\xe9"), "damaged_caption"),
    dropped("a caption of 1 MB", member("last.txt", b"word " * 200_000), "cut_caption"),
    dropped("metadata of brackets", member("last.json", b"[" * 10**6), SIDECAR, "nested deeper"),
    dropped("metadata of a list", member("last.json", b"[]"), SIDECAR, "not a JSON object"),
    dropped("metadata of 17 MB", member("last.json", b" " * (17 << 20)), SIDECAR, "bytes of JSON"),
    dropped("half an emoji in metadata", member("last.json", rb'{"caption": "a \ud83d"}'), "damaged_caption"),
]

# Further videos, under the names that they are found by.
NAMED = [
    held("dots", ("clip.v1.mp4", member("clip.v1.mp4"))),
    held("a folder", ("a/b.mp4", member("a/b.mp4"))),
    held("this folder", ("./b.mp4", member("./b.mp4"))),
    held("slashes", ("a//b/./c.mp4", member("a//b/./c.mp4"))),
    held("out of the folder", ("../../b.mp4", member("../../b.mp4"))),
    held("a whole path", ("/etc/b.mp4", member("/etc/b.mp4"))),
    held("two lines", ("a\nb.mp4", member("a\nb.mp4"))),
    held("a terminal", ("\x1b[2J.mp4", member("\x1b[2J.mp4"))),
    held("colons", ("a::b.mp4", member("a::b.mp4"))),
    held("not UTF-8", (os.fsdecode(b"\xff.mp4"), member(b"\xff.mp4"))),
    held("a prefix", ("d/b.mp4", member("b.mp4", prefix=b"d"))),
    held("a long name of GNU", (LONG, member("././@LongLink", LONG.encode() + b"\0", b"L") + member("bad.mp4"))),
    held("a long name of POSIX", (LONG, pax(path=LONG) + member("bad.mp4"))),
    held("a size of POSIX", ("b.mp4", pax(size="1") + member("b.mp4", b"x", size=0))),
    held("a size in base 256", ("b.mp4", member("b.mp4", size=base_256(1)))),
    held("the old kind", ("b.mp4", member("b.mp4", kind=b"\0"))),
    held("contiguous", ("b.mp4", member("b.mp4", kind=b"7"))),
]

# What makes an end of the shard where it stands: good.mp4 is kept, last.mp4 is not reached.
DAMAGE = [
    dropped("no tar at all", b"\x93" * 1024, "corrupt", "the header at byte 2,048 has"),
    dropped("text", b"not found " * 200, "corrupt", "for a number"),
    dropped("a wrong checksum", member("bad.mp4", checksum=b"000000\0 "), "corrupt", "no header of a member"),
    dropped("no checksum", member("bad.mp4", checksum=b"zzzzzzzz"), "corrupt", "for a number"),
    dropped("a size of 10^15", member("bad.mp4", size=base_256(10**15)), "corrupt", "claims 1,000,000,000,000,000"),
    dropped("a size of 2^80", member("bad.mp4", size=base_256(2**80)), "corrupt", "claims"),
    dropped("a negative size", member("bad.mp4", size=base_256(-512)), "corrupt", "for a number"),
    dropped("a negative size that leads back", member("bad.mp4", size=base_256(-1024)), "corrupt", "for a number"),
    dropped("a size that is no number", member("bad.mp4", size=b"0x10 1_000\0\0"), "corrupt", "for a number"),
    dropped("an extended size of 10^15", pax(size=str(10**15)) + member("bad.mp4"), "corrupt", "claims"),
    dropped("an extended size of 400 digits", pax(size="9" * 400) + member("bad.mp4"), "corrupt", "for a size"),
    dropped("a negative extended size", pax(size="-512") + member("bad.mp4"), "corrupt", "for a size"),
    dropped("a long name of 10^12", member("x", b"", b"L", size=base_256(10**12)), "corrupt", "claims"),
    dropped("a long name of 2 MB", member("x", b"y" * (2 * MAX_HEADER_BYTES), b"L"), "corrupt", "extended header"),
    dropped("an extended header of 2 MB", member("x", bytes(2 * MAX_HEADER_BYTES), b"x"), "corrupt", "extended header"),
    dropped("a record of another length", member("x", b"99 path=y\n", b"x"), "corrupt", "malformed"),
    dropped("a record of no length", member("x", b"path=y\n", b"x"), "corrupt", "malformed"),
    dropped("a record of length 0", member("x", b"0 path=y\n", b"x"), "corrupt", "malformed"),
    dropped("a record of 5000 digits", member("x", b"9" * 5000 + b" path=y\n", b"x"), "corrupt", "malformed"),
]


def shard(path: Path, attacked: bytes) -> Path:
    good = member("good.mp4") + member("good.txt", b"good words")
    path.write_bytes(good + attacked + member("last.mp4") + bytes(2 * BLOCK))
    return path


def is_read(video: str) -> bool:
    path, name = video.split(".tar::", 1)
    return read_member(f"{path}.tar", name) == b"x"


@attacks(MEMBERS)
def test_members(attack: Attack, tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", attack.content)

    def run() -> Mapping[str, str]:
        clips, drops = parse_all(WebDataset(str(path)))
        assert [clip.video for clip in clips] == [f"{path}::good.mp4", f"{path}::last.mp4"]
        assert clips[0].caption == "good words"
        assert all(is_read(clip.video) for clip in clips)
        return drops

    check_ending(attack, run)


@attacks(NAMED)
def test_names_of_members(attack: Attack, tmp_path: Path) -> None:
    name, content = attack.content
    path = shard(tmp_path / "s.tar", content)
    clips, drops = parse_all(WebDataset(str(path)))
    assert {clip.video for clip in clips} == {f"{path}::{found}" for found in ("good.mp4", name, "last.mp4")}
    assert not drops
    assert all(is_read(clip.video) for clip in clips)


@attacks(DAMAGE)
def test_damage(attack: Attack, tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", attack.content)

    def run() -> Mapping[str, str]:
        clips, drops = parse_all(WebDataset(str(path)))
        assert [clip.video for clip in clips] == [f"{path}::good.mp4"]
        # What lies before the damage is not lost by it.
        assert is_read(clips[0].video)
        with pytest.raises(UnreadableClip, match="corrupt"):
            read_member(str(path), "last.mp4")
        return drops

    check_ending(attack, run)


def cut_at(position: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, position)


def grown(path: Path) -> None:
    """Gigabytes of nothing behind the last member's header."""
    os.truncate(path, 2 * BLOCK)
    with open(path, "ab") as stream:
        stream.write(member("huge.mp4", b"", size=base_256(MAX_MEMBER_BYTES + 1)))
    os.truncate(path, 5 * BLOCK + MAX_MEMBER_BYTES + 1024)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.tar")
    path.symlink_to("../elsewhere.tar")


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        path.unlink()
        make(path)

    return run


# What becomes of a shard of good.mp4, beside a good one.
SHARDS = [
    dropped("cut off inside a member", cut_at(BLOCK + 1), "corrupt", "ends at byte 513"),
    dropped("cut off inside a header", cut_at(100), "corrupt", "inside a header"),
    dropped("cut off behind a member", cut_at(2 * BLOCK), "corrupt", "without an end mark"),
    dropped("empty", cut_at(0), "corrupt", "without an end mark"),
    dropped("a member of 2 GB", grown, "too_large", "unpack it"),
    dropped("a link out of the folder", linked, "outside", "is a link to"),
    dropped("a compressed shard", lambda path: path.rename(f"{path}.gz"), "unsupported_format", "unpack it"),
    dropped("a pipe", replaced(os.mkfifo), "not_a_file"),
    dropped("a link to a device", replaced(lambda path: path.symlink_to("/dev/zero")), "outside", "/dev/zero"),
    dropped("a link to itself", replaced(lambda path: path.symlink_to(path.name)), "missing", "leads nowhere"),
    held("a folder", replaced(lambda path: path.mkdir())),
]


LEAVE_THEIR_MEMBER = ("cut off behind a member", "cut off inside a member", "a member of 2 GB")


@attacks(SHARDS)
def test_shards(attack: Attack, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.tar").write_bytes(member("a.mp4") + bytes(2 * BLOCK))
    (folder / "z.tar").write_bytes(member("z.mp4") + bytes(2 * BLOCK))
    attack.content(folder / "a.tar")

    def run() -> Mapping[str, str]:
        clips, drops = parse_all(WebDataset(str(folder)))
        assert f"{folder}/z.tar::z.mp4" in [clip.video for clip in clips]
        assert len(clips) == 1 + (attack.name in LEAVE_THEIR_MEMBER)
        return drops

    check_ending(attack, run)


def test_what_python_writes_is_read_as_python_reads_it(tmp_path: Path) -> None:
    names = ["a.mp4", "d/" * 60 + "b.mp4", "d/" * 200 + "c.mp4", "é你.mp4", "x" * 150 + ".mp4"]
    for style in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{style}.tar"
        written = names[:2] + names[3:4] if style == tarfile.USTAR_FORMAT else names
        with tarfile.open(path, "w", format=style) as archive:
            for name in written:
                info = tarfile.TarInfo(name)
                info.size = len(name)
                archive.addfile(info, io.BytesIO(b"x" * len(name)))
        clips, drops = parse_all(WebDataset(str(path)))
        assert {clip.video for clip in clips} == {f"{path}::{name}" for name in written}
        assert not drops
        assert all(read_member(str(path), name) == b"x" * len(name) for name in written)


def test_captions_of_members_with_dots(tmp_path: Path) -> None:
    """A caption is named as the video, or as WebDataset pairs members: by the name up to the first dot."""
    path = tmp_path / "s.tar"
    content = [member(f"{name}.v1.mp4") for name in "abc"]
    content += [member("a.v1.txt", b"words of a.v1"), member("a.txt", b"words of a"), member("b.txt", b"words of b")]
    content += [member("c.json", json.dumps({"caption": "words of c"}).encode())]
    path.write_bytes(b"".join(content) + bytes(2 * BLOCK))
    captions = [clip.caption for clip in parse_all(WebDataset(str(path)))[0]]
    assert captions == ["words of a.v1", "words of b", "words of c"]
