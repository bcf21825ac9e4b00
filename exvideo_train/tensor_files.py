"""safetensors files: written whole or not at all, and headers of any origin held against the file."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exvideo_train.errors import UnreadableFile, UserError
from exvideo_train.files import atomic_write, open_regular, parse_json, short

if TYPE_CHECKING:
    import torch

# Of CogVideoX-5B's 1,000 tensors the header has 0.1 MiB.
MAX_HEADER_BYTES = 16 << 20
_METADATA = "__metadata__"
_MAX_AXES = 64  # as numpy; torch has no such limit
# What safetensors 0.8 knows (safetensors/src/tensor.rs); the sizes are the format's.
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# Number formats by torch's names.
_NAMES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


def atomic_save_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Save tensors whole or not at all, equal content as equal bytes; metadata values must be strings."""
    # The library writes metadata in the order of a hash table, which differs between runs. Wide numbers come first, so
    # that all are aligned.
    ordered = dict(sorted(tensors.items(), key=lambda entry: (-entry[1].itemsize, entry[0])))
    entries = {
        name: (_NAMES[str(tensor.dtype).removeprefix("torch.")], list(tensor.shape)) for name, tensor in ordered.items()
    }
    atomic_stream_safetensors(path, entries, ordered.values(), metadata or {})


def atomic_stream_safetensors(
    path: Path,
    entries: Mapping[str, tuple[str, list[int]]],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Save tensors as they come, one in memory at a time, whole or not at all.

    Args:
        entries: safetensors' dtype and the shape of each tensor by name, in the order in which they come.
    """
    import torch

    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * _DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)))
            stream.write(text)
            for tensor in tensors:
                stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            assert stream.tell() == 8 + len(text) + end

    atomic_write(path, write)


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: tensor entries and ``__metadata__``.

    What this returns is checked: every entry has a known ``dtype``, a ``shape`` of non-negative ints and the
    ``data_offsets`` that these ask for; the tensors' bytes follow one another without holes and fill the file to its
    end; ``__metadata__``, if it is there, maps strings to strings.

    Raises:
        UnreadableFile: it cannot be read now, or is no regular file: nothing is known of its content.
        UserError: it is missing, or was read and is truncated or no safetensors file; the message names the field.
    """
    with open_regular(path) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            content = stream.read(length) if length <= min(size, MAX_HEADER_BYTES) else b""
        except OSError as error:
            raise UnreadableFile(f"{path} cannot be read ({error.strerror})") from error
    try:
        if len(prefix) < 8:
            raise ValueError(f"{size} bytes")
        if len(content) < length:
            raise ValueError(f"a header of {length} bytes in a file of {size}; at most {MAX_HEADER_BYTES} are read")
        header = parse_json(content)
        end = _check_header(header)
    except ValueError as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); fetch or write it again") from error
    if size != 8 + length + end:
        what = "is truncated" if size < 8 + length + end else "goes on after its last tensor"
        raise UserError(f"{path} {what}: {size} bytes, its header promises {8 + length + end}; fetch or write it again")
    return dict(header)


def _check_header(header: Any) -> int:
    """Bytes of tensors that a header describes."""
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    spans = []
    for name, entry in header.items():
        if name == _METADATA:
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise ValueError(f"{_METADATA}={short(entry)} does not map names to texts")
            continue
        try:
            spans.append((*_span(entry), name))
        except ValueError as error:
            raise ValueError(f"tensor {short(name)}: {error}") from None
    end = 0
    for begin, next_end, name in sorted(spans):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            raise ValueError(f"tensor {short(name)}: data_offsets=[{begin}, {next_end}] {what}, which ends at {end}")
        end = next_end
    return end


def _span(entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{short(entry)} is not made of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise ValueError(f"dtype={short(dtype)} is unknown")
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise ValueError(f"shape={short(shape)} is not a list of at most {_MAX_AXES} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets={short(offsets)} are not two positions")
    begin, end = offsets
    num_bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if num_bits != 8 * (end - begin):
        raise ValueError(f"data_offsets={short(offsets)} do not fit {dtype} of shape {short(shape)}")
    return begin, end


def _are_sizes(values: Any) -> bool:
    # type(), as True is an int too
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
