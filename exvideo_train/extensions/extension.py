"""What the project may know of the thing that is trained: training, export, sampling and plan ask this, no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Extension(Protocol):
    """Parameters added to, or chosen from, a frozen network. Equal ones compare and hash alike."""

    def __hash__(self) -> int: ...

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Extension:
        """What a run's options ask for, as JSON values: of a config, or as a checkpoint keeps them.

        Raises:
            LookupError, TypeError: an option is missing or of another type, as only a damaged checkpoint's can be.
            UserError: a value outside its range.
        """

    @classmethod
    def read(cls, path: Path, family: str | None = None) -> Trained:
        """Read a file that :meth:`write` or another program wrote.

        Args:
            family: of the model that it is for, if that is known; else the file's own word is taken.

        Raises:
            UserError: it is missing, broken, hostile, or of another family.
        """

    @property
    def name(self) -> str:
        """Of the file that holds its weights in a checkpoint: ``<name>.safetensors``."""

    @property
    def shape_options(self) -> tuple[str, ...]:
        """Options that its parameters have their shapes or meaning from: a run goes on with the same ones."""

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

    def initial(self, family: str) -> Trained | None:
        """What training begins from, to be given to :meth:`load`; None for what :meth:`attach` made.

        Raises:
            UserError: the file that the options name is not readable, of another family, or does not fit the options.
        """

    def trained(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The trained parameters by published name, in the network's order."""

    def load(self, network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy tensors with published names into the trained parameters.

        Raises:
            UserError: they do not fit; names ``source``, and nothing has been copied then.
        """

    def place(self, network: nn.Module, name: str, trained: Trained, dtype: torch.dtype, source: str) -> None:
        """Put finished weights on a network for sampling, under a name of their own, in ``dtype``, not trainable.

        They do nothing until :meth:`choose` names them.

        Args:
            source: their file, named in the error.

        Raises:
            UserError: they are of another model, or more than the extension can hold at once.
        """

    def choose(self, network: nn.Module, strengths: Mapping[str, float]) -> None:
        """Let the network compute with the placed weights of these names and no others, added up.

        Args:
            strengths: name -> strength, 1 is as trained; empty: as if nothing had been trained.
        """

    def write(self, path: Path, format: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
        """Write a file that other programs load, whole or not at all.

        Raises:
            UserError: a format that it has not, or tensors that are not its own.
        """


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Args:
        tensors: float32, by published name.
        provenance: base model, frames, steps, commit; empty in other programs' files.
    """

    extension: Extension
    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any]

    def describe(self) -> str:
        """One line for people."""
        about = self.provenance
        line = f"{self.extension.describe()}, {len(self.tensors)} tensors"
        if about:
            line += f"; {about.get('num_frames')} frames, {about.get('steps')} steps on {about.get('base_model')}"
        return line
