"""Where an adapter comes from, as written into its header."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import exvideo_train
from exvideo_train.geometry import Geometry

PACKAGE = Path(exvideo_train.__file__).resolve().parent


def make_provenance(base_model: str, geometry: Geometry, steps: int, **more: Any) -> dict[str, Any]:
    """Base model, frames, size, rate, steps and commit of a run; rank and alpha are added when the file is written.

    Args:
        base_model: hub id or folder, as the run was given it.
        steps: optimizer steps taken.
        more: further JSON values, such as the weights' kind (raw, ema) or the store's fingerprint.
    """
    return {
        "base_model": base_model,
        "num_frames": geometry.num_frames,
        "height": geometry.height,
        "width": geometry.width,
        "fps": geometry.fps,
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
