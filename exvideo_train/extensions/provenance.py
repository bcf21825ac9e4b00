"""Where an adapter comes from, as written into its header."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import exvideo_train
from exvideo_train.errors import UserError
from exvideo_train.files import short
from exvideo_train.geometry import Geometry
from exvideo_train.models.registry import FIRST_FAMILY

PACKAGE = Path(exvideo_train.__file__).resolve().parent


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


# What each field is, for those who read a file; others may stand there too.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("base_model", "family", "positions", "version", "commit", "weights", "adapter_format"), _is_text),
    **dict.fromkeys(("num_frames", "height", "width", "steps", "rank"), _is_count),
    **dict.fromkeys(("fps", "alpha"), _is_positive),
}


def check_provenance(content: Mapping[str, Any], path: str) -> None:
    """Refuse a header whose fields are not what :func:`make_provenance` puts there; ``path`` is named in the error.

    Raises:
        UserError: a known field has another type or range.
    """
    for name, is_right in _FIELDS.items():
        if name in content and not is_right(content[name]):
            raise UserError(
                f"{path}: its header says {name}={short(content[name])}, which is no such value; write the file again"
            )


def make_provenance(
    base_model: str, family: str, geometry: Geometry, steps: int, positions: str = "trained", **more: Any
) -> dict[str, Any]:
    """Base model, frames, size, rate, steps and commit of a run; rank and alpha are added when the file is written.

    Args:
        base_model: hub id or folder, as the run was given it.
        family: its family's name; left out for the first one, whose files were made before there were others.
        steps: optimizer steps taken.
        positions: in time, of the run; left out where they are the base model's own.
        more: further JSON values, such as the weights' kind (raw, ema) or the store's fingerprint.
    """
    return {
        "base_model": base_model,
        **({} if family == FIRST_FAMILY else {"family": family}),
        "num_frames": geometry.num_frames,
        "height": geometry.height,
        "width": geometry.width,
        "fps": geometry.fps,
        **({} if positions == "trained" else {"positions": positions}),
        "steps": steps,
        "version": exvideo_train.__version__,
        "commit": source_commit(),
        **more,
    }


def source_commit() -> str:
    """Commit of the checkout that runs, with ``+changes`` if its code differs from it; else ``unknown``."""
    try:
        tracked = _git("ls-files", "--error-unmatch", "__init__.py")
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # installed without git, or into some other project's checkout
    assert tracked
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
