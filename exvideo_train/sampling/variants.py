"""With what a video is made: with which adapters at which strengths, or with none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exvideo_train.errors import UserError
from exvideo_train.extensions.extension import Trained
from exvideo_train.files import sha256_file, short

WITH_ADAPTER = "with_adapter"
WITHOUT_ADAPTER = "without_adapter"
# An adapter's strength after its name. Windows' drive letters have no number behind their colon.
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_STRENGTH = re.compile(rf"(?P<path>.+):(?P<strength>{_NUMBER})")
_JOINED = re.compile(rf"(.+?\.safetensors(?::{_NUMBER})?)(?:\+|$)")


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter file at a strength; 1 is as trained."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class Variant:
    """A way to make every video; its name is that of the folder that they go to.

    Args:
        adapters: added up; none of them is the base model.
    """

    name: str
    adapters: tuple[PlacedAdapter, ...] = ()


def make_variants(adapters: Sequence[str], compare: bool) -> tuple[Variant, ...]:
    """What ``adapter=`` and ``compare=`` ask for.

    Args:
        adapters: files with their strengths, several of them at once joined by ``+``; each makes videos of its own.
        compare: the base model as well.

    Raises:
        UserError: it is nothing of that kind, or there is nothing to compare with.
    """
    chosen = [tuple(_placed(part) for part in _at_once(entry)) for entry in adapters]
    if len(set(chosen)) < len(chosen):
        raise UserError(f"adapter={short(list(adapters))}: names the same twice; name each variant once")
    if compare and not chosen:
        raise UserError("compare=true: needs an adapter to compare with; set adapter=FILE")
    base = (Variant(WITHOUT_ADAPTER),)
    if not chosen:
        return base
    names = [WITH_ADAPTER] if len(chosen) == 1 else _names(chosen)
    variants = tuple(Variant(name, of_one) for name, of_one in zip(names, chosen, strict=True))
    return variants + base if compare else variants


def _at_once(entry: str) -> list[str]:
    """The parts of ``A.safetensors+B.safetensors:0.5``; a file may have a plus in its name."""
    found = _JOINED.findall(entry)
    return found if "+".join(found) == entry and not Path(entry).exists() else [entry]


def _placed(text: str) -> PlacedAdapter:
    # A file may be called so.
    if (found := _STRENGTH.fullmatch(text)) and not Path(text).exists():
        strength = float(found["strength"])
        if not -100 <= strength <= 100:
            raise UserError(f"adapter={short(text)}: the strength must be from -100 to 100; 1 is as trained")
        return PlacedAdapter(Path(found["path"]).expanduser(), strength)
    return PlacedAdapter(Path(text).expanduser())


def _names(chosen: Sequence[tuple[PlacedAdapter, ...]]) -> list[str]:
    """Folder names that tell variants apart: of the files, with as many parents as it takes."""
    longest = max(len(part.path.parts) for adapters in chosen for part in adapters)
    for depth in range(1, longest + 1):
        names = ["+".join(_name(part, depth) for part in adapters) for adapters in chosen]
        if max(Counter(names).values()) == 1 and WITHOUT_ADAPTER not in names:
            return names
    return [f"{number}_{name}" for number, name in enumerate(names)]


def _name(part: PlacedAdapter, depth: int) -> str:
    parts = [re.sub(r"[^\w.-]+", "_", word) for word in (*part.path.parent.parts, part.path.stem)[-depth:]]
    strength = f"_x{part.strength:g}" if part.strength != 1 else ""
    return "_".join(filter(None, (word.strip("_") for word in parts))) + strength


@dataclass(frozen=True)
class AdapterFile:
    """What is known of an adapter's file.

    Attributes:
        provenance: JSON values of its header.
    """

    sha256: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, trained: Trained) -> AdapterFile:
        return cls(sha256_file(path), dict(trained.provenance))
