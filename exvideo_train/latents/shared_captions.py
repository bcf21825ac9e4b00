"""Embeddings of captions that several clips have: encoded by one encoder of a cluster, read by the others."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from exvideo_train.files import atomic_write_bytes, create_marker

if TYPE_CHECKING:
    from torch import Tensor

# Many times what T5 takes for a caption on a GPU; whoever was to encode it has died then.
PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.05


class SharedCaptions:
    """A folder that all encoders of a run see.

    Args:
        folder: made when first written to; whoever starts and ends a run deletes it.
        patience_seconds: how long to wait for another encoder before encoding its caption as well.
    """

    def __init__(self, folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.folder = folder
        self.patience_seconds = patience_seconds

    def tensors(self, caption: str, encode: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a caption gives: another encoder's, when it has one or is about to, or else by `encode`.

        Raises:
            UserError: the disk is full or not writable.
        """
        from safetensors.torch import load, save

        path = self.folder / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"
        deadline = time.monotonic() + self.patience_seconds
        claim = path.with_suffix(".claim")
        while not path.exists() and not create_marker(claim) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if path.exists():
            return load(path.read_bytes())
        tensors = encode(caption)
        atomic_write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        return tensors
