"""Files that are whole or absent: atomic writes, hashes, safetensors headers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from exvideo_train.errors import UnreadableFile, UserError

if TYPE_CHECKING:
    import torch

# Of CogVideoX-5B's 1,000 tensors the header has 0.1 MiB.
MAX_HEADER_BYTES = 16 << 20
_METADATA = "__metadata__"
_MAX_AXES = 64  # as numpy; torch has no such limit
MAX_JSON_DEPTH = 64
_MAX_DIGITS = 40  # tokenizers write "no limit" as int(1e30)
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
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, flush it to disk, then rename it into place.

    A reader sees the old file or the whole new one, never a part. The temporary file is removed on any error.

    Raises:
        UserError: the disk is full or the target cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        publish({temporary: path})
        temporary = None
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def publish(finished: Mapping[Path, Path]) -> None:
    """Flush finished files to disk, then rename each into place, in this order: what the others belong to comes last.

    Args:
        finished: temporary path and target, on one file system.

    Raises:
        UserError: a target cannot be written.
    """
    reached = next(iter(finished.values()))
    try:
        for temporary, target in finished.items():
            reached = target
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_umask())
        for temporary, target in finished.items():
            reached = target
            os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(reached, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"cannot write {path}: {reason}; free space or choose a writable folder, then run again")


def refuse_inputs(option: str, outputs: Iterable[Path], inputs: Mapping[str, Iterable[Path]]) -> None:
    """What a command reads, it must not write, by whatever name or link it is given.

    Args:
        option: the option that names the outputs.
        outputs: files that would be written.
        inputs: files that are read, by the option that names them.

    Raises:
        UserError: one is both.
    """
    read = [(name, path) for name, paths in inputs.items() for path in paths]
    for output in outputs:
        for name, path in read:
            if _is_same_file(output, path):
                raise UserError(f"{option}= would write {output}, which {name}= reads as {path}; name another file")


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        # One is not there yet.
        return os.path.realpath(one) == os.path.realpath(other)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` whole or not at all."""
    atomic_write(path, lambda temporary: temporary.write_bytes(content))


def create_marker(path: Path) -> bool:
    """Create an empty file, folders included; False if it exists already, whoever made it.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("x").close()
    except FileExistsError:
        return False
    except OSError as error:
        raise _cannot_write(path, error) from error
    return True


def atomic_write_text(path: Path, content: str) -> None:
    """Write UTF-8 text whole or not at all."""
    atomic_write_bytes(path, content.encode())


def atomic_write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys, so that equal content is equal bytes."""
    atomic_write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def atomic_save_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Save tensors whole or not at all, equal content as equal bytes; metadata values must be strings."""
    from safetensors.torch import save

    content = memoryview(save(dict(tensors), dict(metadata) if metadata is not None else None))
    (length,) = struct.unpack("<Q", content[:8])
    # The library writes metadata in the order of a hash table, which differs between runs.
    header = json.loads(bytes(content[8 : 8 + length]))
    ordered = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    begin = _safetensors_begin(ordered | {name: entry for name, entry in header.items() if name != _METADATA})

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            stream.write(begin)
            stream.write(content[8 + length :])

    atomic_write(path, write)


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

    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * _DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    first = _safetensors_begin(header)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            stream.write(first)
            for tensor in tensors:
                stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            assert stream.tell() == len(first) + end

    atomic_write(path, write)


def _safetensors_begin(header: Mapping[str, Any]) -> bytes:
    """Length and header, padded so that the tensors' bytes behind them are aligned."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        UnreadableFile: it cannot be opened now, or is a folder, FIFO, socket or device, at which reading could wait for
            ever.
        UserError: it does not exist.
    """
    try:
        # Without O_NONBLOCK opening a FIFO waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UnreadableFile(f"{path} cannot be opened ({getattr(error, 'strerror', error)})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableFile(f"{path} is not a regular file; give a file, not a folder, pipe or device")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, max_bytes: int) -> bytes:
    """A regular file's content, refused before it is read if it is larger than ``max_bytes``.

    Raises:
        UnreadableFile: as :func:`open_regular`, or reading fails.
        UserError: it does not exist or is too large.
    """
    with open_regular(path) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            if size > max_bytes:
                raise UserError(f"{path} is of {size} bytes, of which at most {max_bytes} are read; fetch it again")
            return stream.read(max_bytes)
        except OSError as error:
            raise UnreadableFile(f"{path} cannot be read ({error.strerror})") from error


def parse_json(content: str | bytes, *, strict: bool = True) -> Any:
    """JSON of untrusted origin, of at most `MAX_JSON_DEPTH` levels.

    Args:
        strict: UTF-8, no key twice, whole characters, 40 digits, no NaN. Rows of data sets are not held to it:
            millions, of many writers.

    Raises:
        ValueError: it is anything else; the message says what.
    """
    text = content.decode() if strict and isinstance(content, bytes) else content
    try:
        value = json.loads(text, **(_STRICT if strict else {}))
    except RecursionError:
        raise ValueError(f"brackets nested deeper than {MAX_JSON_DEPTH}") from None
    # Counting letters is quick, and almost always enough to know that no depth can have been reached.
    brackets = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, brackets)) > MAX_JSON_DEPTH:  # type: ignore[arg-type]
        _check_depth(value)
    if strict and "\\u" in text:  # type: ignore[operator]
        # An escape can spell half of a character, which can neither be printed nor written again.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"key {short(name)} stands there twice")
        unique[name] = value
    return unique


def _bounded_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"{short(text)} has more than {_MAX_DIGITS} digits")
    return int(text)


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{short(text)} is too large for a number")
    return number


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


_STRICT: dict[str, Any] = {
    "object_pairs_hook": _unique_keys,
    "parse_int": _bounded_integer,
    "parse_float": _finite_number,
    "parse_constant": _no_constant,
}


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        containers = [entry for entry in level if isinstance(entry, dict | list)]
        if not containers:
            return
        level = [inner for outer in containers for inner in (outer.values() if isinstance(outer, dict) else outer)]
    raise ValueError(f"brackets nested deeper than {MAX_JSON_DEPTH}")


def short(value: Any) -> str:
    """A value of untrusted origin for a message: as Python writes it, control characters escaped, cut if it is long."""
    return _SHORT.repr(value)


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
