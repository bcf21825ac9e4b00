"""From which checkpoint a run goes on, whether it is of the same run, and what becomes of later ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exvideo_train.errors import UserError
from exvideo_train.training.checkpoint import (
    STATE_FILE,
    Checkpoint,
    CorruptCheckpoint,
    Log,
    list_checkpoints,
    load_checkpoint,
    step_of,
)


def newest_valid_checkpoint(run_dir: Path, log: Log) -> Checkpoint | None:
    """The newest checkpoint that verifies; each newer one that does not is reported."""
    for path in reversed(list_checkpoints(run_dir)):
        try:
            return load_checkpoint(path)
        except CorruptCheckpoint as error:
            log(f"checkpoint passed over: {error}")
    return None


def find_checkpoint(run_dir: Path, resume: str, log: Log) -> Checkpoint | None:
    """What ``resume`` (auto, never or a path) means for a run folder.

    Raises:
        UserError: never, though the folder has checkpoints; a path that is no valid checkpoint or run folder; or auto
            with checkpoints none of which is valid, since beginning anew would throw them away.
    """
    existing = list_checkpoints(run_dir)
    if resume == "never":
        if existing:
            raise UserError(
                f"resume=never but run_dir={run_dir} already has {existing[-1].name}; "
                "choose another run_dir, or delete the folder"
            )
        return None
    if resume == "auto":
        found = newest_valid_checkpoint(run_dir, log)
        if found is None and existing:
            raise UserError(
                f"run_dir={run_dir}: none of its {len(existing)} checkpoints is valid; choose another run_dir to begin "
                "anew, or restore a checkpoint"
            )
        return found
    path = Path(resume)
    # os.path: a name that is too long is no checkpoint either.
    if existing:
        # The command repeated, by a person or by Slurm: the run began from that path and has come further since.
        own = newest_valid_checkpoint(run_dir, log)
        if own is not None and own.state.resumed_from == str(path.resolve()):
            log(f"resume={resume}: this run began there and goes on from {own.path.name}")
            return own
    if os.path.isdir(path / "checkpoints"):
        found = newest_valid_checkpoint(path, log)
        if found is not None:
            return found
    if not os.path.lexists(path / STATE_FILE):
        raise UserError(f"resume={resume}: not auto, not never, and no checkpoint or run folder is there")
    return load_checkpoint(path)


def set_aside_later_checkpoints(run_dir: Path, step: int, log: Log) -> None:
    """Rename checkpoints of steps after ``step``, where the run goes on from.

    They are damaged, or of the course that a resume from an earlier checkpoint leaves; under their names they would
    be the newest, and what this run writes would be pruned as old.
    """
    for path in list_checkpoints(run_dir):
        if step_of(path) > step:
            aside = path.with_name(f"superseded_{path.name}")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}_older")
            path.rename(aside)
            log(f"the run goes on from step {step}: {path.name} is kept as {aside.name}; delete it when not needed")


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], shape_options: Sequence[str]) -> list[str]:
    """Compare a checkpoint's config with the one given now.

    Args:
        shape_options: those that what is trained has its shape from.

    Returns:
        notes on options that differ and may.

    Raises:
        UserError: options that the checkpoint's tensors or sample order depend on differ; names each with both values.
    """
    fixed: tuple[str, ...] = (
        "seed",
        "num_frames",
        "height",
        "width",
        "fps",
        "positions",
        "model.path",
        "model.revision",
        "data.geometries",
        "data.held_out_clips",
        *shape_options,
    )
    ignored = ("latents", "run_dir", "resume", "dry_run", "logger.", "checkpoint.", "safety.", "validation.")
    flat_saved, flat_current = _flatten(saved), _flatten(current)
    # An option that has come since stands at what the run was made with.
    differing = {key: (value, flat_current.get(key)) for key, value in flat_saved.items()}
    differing = {k: pair for k, pair in differing.items() if pair[0] != pair[1]}
    wrong = {key: pair for key, pair in differing.items() if key in fixed}
    if wrong:
        lines = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in wrong.items())
        raise UserError(f"the checkpoint is of another run: {lines}; use the old values or another run_dir")
    return [f"{key} was {old!r}, now {new!r}" for key, (old, new) in differing.items() if not key.startswith(ignored)]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
