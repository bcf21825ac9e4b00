"""Members of a tar shard, by a reader of our own: one pass over the headers, each of a size that is known before.

The standard library's reader takes a damaged header in the middle for the end, so that the rest is silently gone, reads
whatever length an extended header claims into memory, and ends in many kinds of errors. Nothing is unpacked here: a
member's name is a name, wherever it seems to lead, and its content is read from the shard itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

_BLOCK = 512
MAX_HEADER_BYTES = 1 << 20
"""Of an extended header, which holds a long name and a few times."""
MAX_MEMBERS = 1_000_000
"""Of one shard; video2dataset writes a few thousand."""
MAX_MEMBER_BYTES = 2 << 30
"""Of a video in a shard, which is read whole: larger ones are to be unpacked."""
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_PAX_RECORD = re.compile(rb"(\d{1,7}) ")
FOLDER = "a folder"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": FOLDER,
    b"6": "a pipe",
    b"S": "a sparse file",
}
_WITHOUT_CONTENT = frozenset(b"123456")
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK = b"L", b"K"
_PAX, _PAX_GLOBAL = (b"x", b"X"), b"g"


class DamagedShard(ValueError):
    """From here on the shard cannot be read; the message says where and why."""


@dataclass(frozen=True)
class Member:
    """One entry of a shard.

    Attributes:
        name: as the shard spells it; bytes that are not UTF-8 as in `os.fsdecode`.
        offset, size: where its content lies in the shard, in bytes.
        kind: empty for a regular file, else what it is instead, for a person.
    """

    name: str
    offset: int
    size: int
    kind: str = ""


def iter_members(descriptor: int) -> Iterator[Member]:
    """Every member of the open shard in its order, all of whose content lies within the file.

    Raises:
        DamagedShard: the shard is no tar file, damaged or cut off from here on; the members before are good.
    """
    end = os.fstat(descriptor).st_size
    position, num_members = 0, 0
    long_name, pax = None, dict[bytes, bytes]()
    while True:
        header = os.pread(descriptor, _BLOCK, position)
        if not header.strip(b"\0"):
            if len(header) < _BLOCK:
                raise DamagedShard(f"it ends at byte {end:,} without an end mark")
            return
        if len(header) < _BLOCK:
            raise DamagedShard(f"it ends at byte {end:,} inside a header")
        if _checksum(header) != _number(header[148:156], position):
            raise DamagedShard(f"no header of a member at byte {position:,}")
        kind = header[156:157]
        content = position + _BLOCK
        is_extension = kind in (_LONG_NAME, _LONG_LINK, _PAX_GLOBAL, *_PAX)
        size = _number(header[124:136], position)
        if b"size" in pax and not is_extension:
            size = _pax_size(pax[b"size"], position)
        if kind == b"S":
            content = _after_sparse_map(descriptor, header, content)
        if header[156] in _WITHOUT_CONTENT:
            size = 0
        if content + size > end:
            raise DamagedShard(f"the member at byte {position:,} claims {size:,} bytes, the shard has {end:,}")
        if is_extension:
            if size > MAX_HEADER_BYTES:
                raise DamagedShard(
                    f"the extended header at byte {position:,} has {size:,} bytes; {MAX_HEADER_BYTES:,} are the most"
                )
            extension = os.pread(descriptor, size, content)
            if kind == _LONG_NAME:
                long_name = extension.split(b"\0", 1)[0]
            elif kind in _PAX:
                pax = _pax_records(extension, position)
        else:
            num_members += 1
            if num_members > MAX_MEMBERS:
                raise DamagedShard(f"it has more than {MAX_MEMBERS:,} members")
            yield _member(header, long_name, pax, content, size)
            long_name, pax = None, {}
        position = content + -(-size // _BLOCK) * _BLOCK


def _member(header: bytes, long_name: bytes | None, pax: dict[bytes, bytes], content: int, size: int) -> Member:
    flag = header[156:157]
    name = header[:100].split(b"\0", 1)[0]
    # Only POSIX has a second field of the name; GNU keeps times there.
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    name = pax.get(b"GNU.sparse.name", pax.get(b"path", long_name if long_name is not None else name))
    kind = "" if flag in _REGULAR else _KINDS.get(flag, f"of the unknown kind {flag!r}")
    if any(key.startswith(b"GNU.sparse.") for key in pax):
        kind = _KINDS[b"S"]
    elif not kind and name.endswith(b"/"):
        kind = FOLDER
    return Member(name.decode("utf-8", "surrogateescape"), content, size, kind)


def _checksum(header: bytes) -> int:
    """The sum of the header's bytes, its own field as spaces; writers that summed signed bytes are long gone."""
    return sum(header[:148]) + 8 * 32 + sum(header[156:])


def _number(field: bytes, position: int) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _OCTAL.fullmatch(field)
    if digits is None:
        raise DamagedShard(f"the header at byte {position:,} has {field!r} for a number")
    return int(digits[1] or b"0", 8)


def _pax_size(text: bytes, position: int) -> int:
    if not text.isdigit() or len(text) > 20:
        raise DamagedShard(f"the header at byte {position:,} has {text[:40]!r} for a size")
    return int(text)


def _pax_records(content: bytes, position: int) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(content) and content[start]:
        length = _PAX_RECORD.match(content, start)
        stop = start + int(length[1]) if length else 0
        if length is None or not length.end() < stop <= len(content) or content[stop - 1] != ord("\n"):
            raise DamagedShard(f"the extended header at byte {position:,} is malformed")
        key, _, value = content[length.end() : stop - 1].partition(b"=")
        records[key] = value
        start = stop
    return records


def _after_sparse_map(descriptor: int, header: bytes, content: int) -> int:
    """Where the content of an old GNU sparse file begins: after as many blocks as its map goes on for."""
    is_continued = header[482]
    while is_continued:
        block = os.pread(descriptor, _BLOCK, content)
        if len(block) < _BLOCK:
            raise DamagedShard(f"it ends at byte {content + len(block):,} inside the map of a sparse file")
        is_continued = block[504]
        content += _BLOCK
    return content
