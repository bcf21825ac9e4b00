"""What training may know of the thing that is trained: engine, checkpoints, loop and export ask this, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Extension(Protocol):
    """Parameters added to, or chosen from, a frozen network."""

    @property
    def name(self) -> str:
        """Of the file that holds its weights in a checkpoint: ``<name>.safetensors``."""

    @property
    def has_dropout(self) -> bool:
        """Whether it draws random numbers in training, which recomputation must draw again alike."""

    def describe(self) -> str:
        """A few words for the log."""

    def attach(self, network: nn.Module, seed: int) -> None:
        """Freeze the network and make the trained parameters in it, float32, functions of ``seed`` and their names.

        Raises:
            UserError: it does not fit the network.
        """

    def trained(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The trained parameters by published name, in the network's order."""

    def load(self, network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy tensors with published names into the trained parameters.

        Raises:
            UserError: they do not fit; names ``source``, and nothing has been copied then.
        """

    def write(self, path: Path, format: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
        """Write a file that other programs load, whole or not at all.

        Raises:
            UserError: a format that it has not, or tensors that are not its own.
        """
