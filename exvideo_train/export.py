"""``python -m exvideo_train.export``: a run's adapter, written for other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from exvideo_train.config.commands import Export, Weights
from exvideo_train.entry import run_command
from exvideo_train.errors import UserError
from exvideo_train.extensions.adapter_file import read_provenance
from exvideo_train.extensions.extension import Trained
from exvideo_train.extensions.model_card import check_card, finish_card
from exvideo_train.extensions.provenance import make_provenance
from exvideo_train.files import atomic_write_bytes, refuse_inputs
from exvideo_train.geometry import Geometry
from exvideo_train.models.registry import FIRST_FAMILY, family_named
from exvideo_train.tensor_files import read_safetensors_header
from exvideo_train.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, step_folder, step_of
from exvideo_train.training.loggers import read_metrics
from exvideo_train.training.resume import newest_valid_checkpoint

USAGE = """\
Write a run's adapter for diffusers (and PEFT), DiffSynth-Studio or ComfyUI.

  python -m exvideo_train.export run_dir=RUN format=diffusers adapter=A.safetensors
"""
# What the trainer writes at the end of a run.
FINAL_ADAPTERS = {Weights.raw: "adapter.safetensors", Weights.ema: "adapter_ema.safetensors"}


def export(config: Export) -> None:
    """Find the adapter in the run folder and write it in the format asked for."""
    target, run_dir = Path(config.adapter), Path(config.run_dir)
    trained, source = find_trained(run_dir, config.weights, config.step)
    # The run's own adapters are the trainer's to write, of the steps that it ends with.
    finals = [run_dir / name for name in FINAL_ADAPTERS.values()]
    refuse_inputs("adapter", [target], {"run_dir": [*finals, *(run_dir / "checkpoints").rglob("*")]})
    if (run_dir / "checkpoints").resolve() in target.resolve().parents:
        raise UserError(f"adapter={target}: lies among the run's checkpoints; name a file outside")
    check_card(target, config)
    trained.extension.write(target, config.format.value, trained.tensors, trained.provenance)
    print(f"{target}: {config.format.value}, {trained.describe()}, {target.stat().st_size / 1e9:.3g} GB, from {source}")
    if config.card or config.push:
        facts = _facts(run_dir, trained)
        curves = ""
        if (run_dir / "curves.png").is_file():
            curves = f"{target.stem}_curves.png"
            atomic_write_bytes(target.with_name(curves), (run_dir / "curves.png").read_bytes())
        finish_card(target, config.format, config, trained, facts, curves)


def _facts(run_dir: Path, trained: Trained) -> dict[str, Any]:
    """What the run folder knows besides the adapter's own header."""
    facts: dict[str, Any] = {"trained": trained.extension.describe()}
    step = trained.provenance.get("steps")
    if step is not None and step_folder(run_dir, step).is_dir():
        facts["samples seen"] = load_checkpoint(step_folder(run_dir, step)).state.position
    records = [record for record in read_metrics(run_dir) if step is None or record["step"] <= step]
    if epochs := [record["epoch"] for record in records if type(record.get("epoch")) in (int, float)]:
        facts["epochs"] = f"{epochs[-1]:.3g}"
    validations = [record["validation"] for record in records if "validation" in record]
    if validations and "num_clips" in validations[-1]:
        facts["held-out clips"] = validations[-1]["num_clips"]
    for name, losses in (
        ("training loss, last", [record["loss"] for record in records if record.get("loss") is not None][-1:]),
        ("validation loss, first and last", [validation["loss"] for validation in validations]),
    ):
        if losses:
            facts[name] = " and ".join(f"{loss:.4g}" for loss in dict.fromkeys((losses[0], losses[-1])))
    return facts


def find_trained(run_dir: Path, weights: Weights, step: int | None) -> tuple[Trained, Path]:
    """What a step gave, or the one that was trained longest: the finished run's or the newest checkpoint's.

    Raises:
        UserError: no such run folder or step, nothing saved yet, or no moving average kept.
    """
    # os.path: a name that is too long is no folder either.
    if not os.path.isdir(run_dir):
        raise UserError(f"run_dir={run_dir}: no such folder; name the run_dir of launch/train.py")
    checkpoints = {step_of(path): path for path in list_checkpoints(run_dir)}
    final = run_dir / FINAL_ADAPTERS[weights]
    final_step = int(_provenance(final).get("steps", 0)) if final.exists() else None
    if step is not None and step != final_step:
        if step not in checkpoints:
            steps = sorted({*checkpoints, *([final_step] if final_step is not None else [])})
            raise UserError(f"step={step}: not in {run_dir}; it has: {', '.join(map(str, steps)) or 'none'}")
        return from_checkpoint(load_checkpoint(checkpoints[step]), weights)
    if final_step is not None and (step is not None or final_step >= max(checkpoints, default=0)):
        return _from_file(final)
    newest = newest_valid_checkpoint(run_dir, print)
    if newest is not None and (final_step is None or newest.state.step > final_step):
        return from_checkpoint(newest, weights)
    if final_step is None:
        raise UserError(f"run_dir={run_dir}: holds no {final.name} and no checkpoint; train first, or wait for one")
    return _from_file(final)


def _from_file(path: Path) -> tuple[Trained, Path]:
    return family_named(_provenance(path).get("family", FIRST_FAMILY), path).extension().read(path), path


def _provenance(path: Path) -> dict[str, Any]:
    return read_provenance(read_safetensors_header(path).get("__metadata__", {}), str(path))


def from_checkpoint(checkpoint: Checkpoint, weights: Weights) -> tuple[Trained, Path]:
    """What a checkpoint holds, and its folder.

    Raises:
        UserError: it has no config of a run, or kept no moving average.
    """
    config: dict[str, Any] = checkpoint.state.config
    family = family_named(checkpoint.state.family, checkpoint.path)
    try:
        extension = family.extension().from_options(config)
        geometry = Geometry(config["num_frames"], config["height"], config["width"], config["fps"])
        base_model = str(config["model"]["path"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: its state.json has no config of a run ({error}); take another") from error
    positions = str(config.get("positions", "trained"))
    provenance = make_provenance(
        base_model, family.name, geometry, checkpoint.state.step, positions, weights=weights.value
    )
    tensors = checkpoint.tensors(extension.name if weights is Weights.raw else "ema")
    return Trained(extension, tensors, provenance), checkpoint.path


def main() -> None:
    run_command(Export, export, "export", USAGE)


if __name__ == "__main__":
    main()
