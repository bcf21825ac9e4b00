"""One file of a latent store: safetensors, what it says of itself in its header, and a digest of its tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exvideo_train.errors import UserError
from exvideo_train.files import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

# safetensors writes metadata in the order of a randomly seeded hash map: only with a single key are files
# of equal content equal bytes.
METADATA_KEY = "exvideo_train"


class CorruptLatent(UserError):
    """A latent file that is missing, truncated or changed since it was written."""


def is_latent_file(path: Path) -> bool:
    """False for the temporary files that a killed writer leaves."""
    return path.suffix == ".safetensors" and not path.name.startswith(".")


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encode_latent_file(tensors: dict[str, Tensor], content: dict[str, Any]) -> tuple[bytes, str]:
    """A file's bytes, and the digest of its tensors that goes into it."""
    from safetensors.torch import save

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sha256 = tensors_digest(ready)
    metadata = {METADATA_KEY: json.dumps({**content, "sha256": sha256}, sort_keys=True)}
    return save(ready, metadata), sha256


def read_content(path: Path) -> dict[str, Any]:
    """What a file says of itself; reads its header only.

    Raises:
        CorruptLatent: it is missing or no latent file.
    """
    try:
        header = read_safetensors_header(path)
        content = dict[str, Any](json.loads(header["__metadata__"][METADATA_KEY]))
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{path} is not a latent file ({error!r})"
        raise CorruptLatent(f"{reason}; delete it and encode again") from error
    return content


def read_latent_file(path: Path, verify: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by memory map, and what the file says of itself.

    Raises:
        CorruptLatent: it is missing or no latent file, or with ``verify`` its tensors do not match their digest.
    """
    from safetensors import SafetensorError, safe_open

    content = read_content(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CorruptLatent(f"{path} cannot be read ({error}); delete it and encode again") from error
    if verify and tensors_digest(tensors) != content.get("sha256"):
        raise CorruptLatent(f"{path}: its tensors do not match their checksum; delete it and encode again")
    return tensors, content
