"""Files that are whole or absent: atomic writes, hashes, safetensors headers."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exvideo_train.errors import UserError

if TYPE_CHECKING:
    import torch


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
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
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose a writable folder, then run again"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` whole or not at all."""
    atomic_write(path, lambda temporary: _write_all(temporary, content))


def _write_all(path: Path, content: bytes) -> None:
    path.write_bytes(content)


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
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error
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
    ordered = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    ordered |= {name: entry for name, entry in header.items() if name != "__metadata__"}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)))
            stream.write(text)
            stream.write(content[8 + length :])

    atomic_write(path, write)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: tensor entries and ``__metadata__``.

    Raises:
        UserError: the file is missing, truncated or not safetensors; the file's size is checked against the header.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("header longer than the file")
            header: dict[str, Any] = json.loads(stream.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    # The last three: JSON of another shape than a safetensors header.
    except (struct.error, ValueError, AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); fetch or write it again") from error
    if size != 8 + length + end:
        raise UserError(
            f"{path} is truncated: {size} bytes, its header promises {8 + length + end}; fetch or write it again"
        )
    return header
