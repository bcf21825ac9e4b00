"""Safetensors files of any shape through the one reader of headers that adapters, checkpoints and latents share."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.attacks import Attack, attacks, check_ending, held, refused

from exvideo_train.errors import UnreadableFile, UserError
from exvideo_train.tensor_files import MAX_HEADER_BYTES, read_safetensors_header


def raw(header: bytes | str, data: int = 0, length: int | None = None) -> bytes:
    """A file of a header as it stands, with zeros as data, whatever length it claims."""
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(data)


def file(header: Any, data: int = 0) -> bytes:
    return raw(json.dumps(header), data)


def one(data: int = 8, **change: Any) -> bytes:
    """A file of one F32 tensor (2,), with changed fields; a field set to ... is left out."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}
    return file({"a": {name: value for name, value in entry.items() if value is not ...}}, data)


def two(first: tuple[int, int], second: tuple[int, int], data: int = 16) -> bytes:
    """A file of two tensors, U8, at these offsets."""
    spans = {"a": first, "b": second}
    return file({n: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for n, (b, e) in spans.items()}, data)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


GOOD = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
REFUSED = [
    refused("nothing", b"", "truncated", "0 bytes"),
    refused("seven bytes", b"\x01" * 7, "truncated", "7 bytes"),
    refused("a web page", b"<html>not found</html>" * 10, "not a safetensors file"),
    refused("no header", raw(""), "not a safetensors file"),
    refused("header cut", raw('{"a":', length=400), "header of 400 bytes"),
    refused("header of 2^64 - 1 bytes", raw("{}", length=2**64 - 1), f"header of {2**64 - 1} bytes"),
    refused("header over the bound", raw(b" " * (MAX_HEADER_BYTES + 1)), str(MAX_HEADER_BYTES)),
    refused("UTF-16", raw("{}".encode("utf-16")), "utf-8"),
    refused("byte order mark", raw(b"\xef\xbb\xbf{}"), "BOM"),
    refused("not UTF-8", raw(b'{"\xff":1}'), "utf-8"),
    refused("a list", raw("[]"), "no object"),
    refused("a null", raw("null"), "no object"),
    refused("two objects", raw("{}{}"), "Extra data"),
    refused("100,000 lists deep", raw(nested(100_000)), "nested deeper"),
    refused("500 objects deep", raw('{"a":' * 500 + "1" + "}" * 500), "nested deeper"),
    refused("70 lists in a shape", raw(f'{{"a":{{"shape":{nested(70)}}}}}'), "nested deeper"),
    refused("a name twice", raw(f"{{{GOOD},{GOOD}}}", 8), "'a'", "twice"),
    refused("a field twice", raw('{"a":{"dtype":"F32","dtype":"F16"}}'), "'dtype'", "twice"),
    refused("metadata twice", raw('{"__metadata__":{},"__metadata__":{}}'), "twice"),
    refused("half a character in a name", raw('{"\\ud83d":1}'), "surrogates not allowed"),
    refused("half a character in metadata", raw('{"__metadata__":{"a":"\\udc00"}}'), "surrogates not allowed"),
    refused("NaN", raw('{"a":NaN}'), "NaN"),
    refused("1e999", raw('{"a":1e999}'), "1e999", "too large"),
    refused("400 digits", raw(f'{{"a":{"9" * 400}}}'), "digits"),
    refused("5000 digits", raw(f'{{"a":{"9" * 5000}}}'), "digits"),
    refused("metadata a list", file({"__metadata__": []}), "__metadata__"),
    refused("metadata null", file({"__metadata__": None}), "__metadata__"),
    refused("metadata of numbers", file({"__metadata__": {"step": 1}}), "__metadata__", "'step'"),
    refused("metadata of objects", file({"__metadata__": {"a": {}}}), "__metadata__"),
    refused("entry a number", file({"a": 1}), "'a'"),
    refused("entry a list", file({"a": ["F32", [2], [0, 8]]}), "'a'"),
    refused("no dtype", one(dtype=...), "'a'", "dtype"),
    refused("no shape", one(shape=...), "'a'", "shape"),
    refused("no offsets", one(data_offsets=...), "'a'", "data_offsets"),
    refused("a field more", one(device="cuda"), "'a'", "device"),
    refused("dtype unknown", one(dtype="F128"), "'a'", "dtype='F128'"),
    refused("dtype in lower case", one(dtype="f32"), "dtype='f32'"),
    refused("dtype null", one(dtype=None), "dtype=None"),
    refused("dtype a list", one(dtype=["F32"]), "dtype=['F32']"),
    refused("shape null", one(shape=None), "shape=None"),
    refused("shape a number", one(shape=2), "shape=2"),
    refused("shape a text", one(shape="2"), "shape='2'"),
    refused("size negative", one(shape=[-2]), "shape=[-2]"),
    refused("sizes negative twice", one(shape=[-1, -2]), "shape=[-1, -2]"),
    refused("size a fraction", one(shape=[2.0]), "shape=[2.0]"),
    refused("size true", one(shape=[True, 2]), "shape=[True, 2]"),
    refused("size of 2^63", one(shape=[2**63]), "shape="),
    refused("product beyond 64 bits", one(shape=[2**32, 2**32]), "data_offsets"),
    refused("product that wraps around to 8 bytes", one(shape=[2**62 + 1, 2]), "data_offsets"),
    refused("size zero hides 2^62", one(shape=[2**62, 0]), "data_offsets"),
    refused("65 axes", one(shape=[1] * 64 + [2]), "axes"),
    refused("a million axes", one(shape=[1] * 1_000_000 + [2]), "axes"),
    refused("offsets null", one(data_offsets=None), "data_offsets=None"),
    refused("one offset", one(data_offsets=[0]), "data_offsets=[0]"),
    refused("three offsets", one(data_offsets=[0, 4, 8]), "data_offsets=[0, 4, 8]"),
    refused("offsets negative", one(data_offsets=[-8, 0]), "data_offsets=[-8, 0]"),
    refused("offsets fractions", one(data_offsets=[0.0, 8.0]), "data_offsets=[0.0, 8.0]"),
    refused("offsets true", one(data_offsets=[False, 8]), "data_offsets=[False, 8]"),
    refused("offsets in reverse", one(data_offsets=[8, 0]), "data_offsets=[8, 0]"),
    refused("offsets too short", one(data_offsets=[0, 7]), "do not fit F32"),
    refused("offsets too long", one(data_offsets=[0, 16], data=16), "do not fit F32"),
    refused("offsets of 2^62", one(data_offsets=[2**62, 2**62 + 8]), "hole"),
    refused("half a byte", file({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1), "do not fit F4"),
    refused("hole at the beginning", one(data_offsets=[8, 16], data=16), "hole"),
    refused("hole between", two((0, 4), (8, 16)), "'b'", "hole"),
    refused("overlap", two((0, 10), (8, 16)), "'b'", "overlaps"),
    refused("one within the other", two((0, 16), (4, 8)), "'b'", "overlaps"),
    refused("twice the same bytes", two((0, 16), (0, 16)), "'b'", "overlaps"),
    refused("data cut", one(data=7), "is truncated"),
    refused("no data", one(data=0), "is truncated"),
    refused("a terabyte that is not there", one(shape=[1 << 38], data_offsets=[0, 1 << 40]), "is truncated"),
    refused("data too long", one(data=9), "goes on after its last tensor"),
    refused("data without tensors", file({}, 1), "goes on after its last tensor"),
    refused("terminal escapes in a name", file({"\x1b[2J": 1}), "'\\x1b[2J'"),
    refused("a name of a megabyte", file({"n" * 1_000_000: 1}), "nnn..."),
]
HELD = [
    held("one tensor", one()),
    held("no tensor", file({})),
    held("metadata alone", file({"__metadata__": {"a": "b"}})),
    held("0 axes", one(shape=[], data_offsets=[0, 4], data=4)),
    held("an empty tensor", one(shape=[3, 0], data_offsets=[0, 0], data=0)),
    held("empty ones between", two((0, 0), (0, 16))),
    held("in another order", two((8, 16), (0, 8))),
    held("padded", raw(f"{{{GOOD}}}   ", 8)),
    held("an emoji in two escapes", raw('{"__metadata__":{"a":"\\ud83d\\ude00"}}')),
]


@attacks([*REFUSED, *HELD])
def test_headers(attack: Attack, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(attack.content)

    def read() -> dict[str, str]:
        read_safetensors_header(path)
        load_file(path)
        return {}

    check_ending(attack, read)


@pytest.mark.parametrize("content", [case.content for case in REFUSED], ids=[case.name for case in REFUSED])
def test_messages_name_the_file_and_are_short_and_printable(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        read_safetensors_header(path)
    message = str(refusal.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 1000
    # What was read and is wrong is a damaged file, not an unreadable one.
    assert not isinstance(refusal.value, UnreadableFile)


def _unreadable(path: Path) -> None:
    path.write_bytes(one())
    path.chmod(0)


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        Path.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.name),
        pytest.param(_unreadable, marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")),
    ],
    ids=["a FIFO", "a folder", "a link to a device", "a link to itself", "no permission"],
)
def test_what_cannot_be_read_is_not_called_damaged(make: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(UnreadableFile, match=r"x\.safetensors"):
        read_safetensors_header(path)


@pytest.mark.parametrize("path", ["missing", "file/below"])
def test_missing(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="does not exist"):
        read_safetensors_header(tmp_path / path)
