"""A manifest that is written: what lies beside it, and that neither a mistake nor a second process costs anything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from exvideo_train import locks
from exvideo_train.errors import UserError
from exvideo_train.files import refuse_inputs


def dropped_path(manifest: Path) -> Path:
    """The list of what did not enter a manifest, with reasons."""
    return manifest.with_name(f"{manifest.stem}.dropped.jsonl")


def report_path(manifest: Path) -> Path:
    """The page of a filter run."""
    return manifest.with_name(f"{manifest.stem}.report.html")


def measures_path(manifest: Path) -> Path:
    """Measures of all clips that filter runs have judged; kept, so that other thresholds cost no decoding."""
    return manifest.with_name(f"{manifest.stem}.measures.sqlite")


def working_folder(manifest: Path) -> Path:
    """Temporary files of a manifest in the making; removed when it is finished."""
    return manifest.with_name(f".{manifest.name}.building")


def failed_path(manifest: Path) -> Path:
    """By which the list and page of a run that kept nothing are named: those of a good result stay as they are."""
    return _failed(manifest) if manifest.exists() else manifest


def _failed(manifest: Path) -> Path:
    return manifest.with_name(f"{manifest.stem}.failed.jsonl")


def outputs(manifest: Path) -> list[Path]:
    """Every file that a command may write for this manifest."""
    beside = [place(name) for name in (manifest, _failed(manifest)) for place in (dropped_path, report_path)]
    return [manifest, *beside, measures_path(manifest)]


@contextmanager
def hold_target(option: str, manifest: Path, inputs: Mapping[str, Sequence[Path]]) -> Iterator[None]:
    """The right to write a manifest and what lies beside it.

    Args:
        option: the command's name for it.
        manifest: the file.
        inputs: files that the command reads, by their options.

    Raises:
        UserError: it cannot be a manifest's name, an input would be overwritten, or another process is writing it.
    """
    # Path.is_dir raises for a name that is too long; the lock then says so.
    if os.path.isdir(manifest):
        raise UserError(f"{option}={manifest} is a folder; give a file name such as {manifest / 'clips.jsonl'}")
    refuse_inputs(option, outputs(manifest), inputs)
    if manifest.suffix != ".jsonl":
        # By their endings videos, captions and tables are found: none is taken for a manifest, nor a manifest for one.
        raise UserError(f"{option}={manifest}: a manifest's name must end in .jsonl; give another")
    lock = manifest.with_name(f".{manifest.name}.lock")
    with locks.hold(lock, f"{option}={manifest}", "wait for it, stop it, or give another file"):
        yield
