"""Files that are whole or absent: atomic writes, hashes, strict JSON."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from exvideo_train.errors import UnreadableFile, UserError

MAX_JSON_DEPTH = 64
_MAX_DIGITS = 40  # tokenizers write "no limit" as int(1e30)
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
