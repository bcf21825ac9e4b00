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
_STRENGTH = re.compile(r"(?P<path>.+):(?P<strength>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")


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


def make_variants(adapter: Any, compare: bool) -> tuple[Variant, ...]:
    """What ``adapter=`` and ``compare=`` ask for.

    Args:
        adapter: a file, or a list whose entries are files and lists of files taken at once.
        compare: the base model as well.

    Raises:
        UserError: it is nothing of that kind, or there is nothing to compare with.
    """
    chosen = [tuple(map(_placed, _as_list(entry))) for entry in _as_list(adapter) if entry is not None]
    if not all(chosen) or len(set(chosen)) < len(chosen):
        raise UserError(f"adapter={short(adapter)}: names nothing, or the same adapter twice; name each variant once")
    if compare and not chosen:
        raise UserError("compare=true: needs an adapter to compare with; set adapter=FILE")
    base = (Variant(WITHOUT_ADAPTER),)
    if not chosen:
        return base
    names = [WITH_ADAPTER] if len(chosen) == 1 else _names(chosen)
    variants = tuple(Variant(name, adapters) for name, adapters in zip(names, chosen, strict=True))
    return variants + base if compare else variants


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _placed(text: Any) -> PlacedAdapter:
    if not isinstance(text, str) or not text:
        raise UserError(f"adapter={short(text)}: must name a file, like A.safetensors or A.safetensors:0.7")
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
