"""``python -m exvideo_train.adapter ACTION``: look into adapter files, compare them and make others of them."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exvideo_train.config.adapter import (
    AdapterAverage,
    AdapterConvert,
    AdapterDiff,
    AdapterInspect,
    AdapterMerge,
    AdapterOptions,
    AdapterResize,
    AverageOf,
)
from exvideo_train.entry import USER_ERROR_STATUS, run_command
from exvideo_train.errors import UserError
from exvideo_train.export import find_trained, from_checkpoint
from exvideo_train.extensions import adapter_math
from exvideo_train.extensions.adapter_file import Adapter, read_adapter, write_adapter
from exvideo_train.extensions.adapter_math import Measured, norms
from exvideo_train.extensions.adapter_names import BLOCK
from exvideo_train.extensions.extension import Trained
from exvideo_train.extensions.lora import LoraExtension
from exvideo_train.extensions.merge import merge
from exvideo_train.extensions.model_card import check_card, finish_card
from exvideo_train.files import refuse_inputs
from exvideo_train.models.hub import resolve_model_path
from exvideo_train.models.registry import backbone_family, known_family
from exvideo_train.training.checkpoint import STATE_FILE, load_checkpoint

USAGE = """\
Look into adapter files of any program, compare them, and make others of them.

  python -m exvideo_train.adapter inspect adapter=A.safetensors
  python -m exvideo_train.adapter convert adapter=A.safetensors format=kohya output=B.safetensors
  python -m exvideo_train.adapter diff adapter=A.safetensors other=B.safetensors
  python -m exvideo_train.adapter average adapters=[RUN/checkpoints/step_00001000,RUN] output=M.safetensors
  python -m exvideo_train.adapter average adapters=[1.safetensors,2.safetensors,3.safetensors] ema_steps=500 output=...
  python -m exvideo_train.adapter resize adapter=A.safetensors rank=16 output=S.safetensors
  python -m exvideo_train.adapter merge adapter=A.safetensors model_path=MODEL output=MERGED

Each has a --help of its own.
"""


def read_source(source: str, options: AdapterOptions) -> Adapter:
    """An adapter of a file, PEFT's folder, a checkpoint or a run folder.

    Raises:
        UserError: nothing of that is there, it is broken, or what is in it is no LoRA.
    """
    path = Path(source)
    if (path / STATE_FILE).is_file():
        trained, _ = from_checkpoint(load_checkpoint(path), options.weights)
    elif (path / "checkpoints").is_dir() or (path / "adapter.safetensors").is_file():
        trained, _ = find_trained(path, options.weights, None)
    else:
        return read_adapter(path, options.family)
    lora = trained.extension
    if not isinstance(lora, LoraExtension):
        raise UserError(f"{path}: holds {lora.describe()}, no LoRA; this command knows LoRA alone")
    return Adapter(dict(trained.tensors), lora.rank, lora.alpha, lora.target_modules, dict(trained.provenance))


def inspect(config: AdapterInspect) -> None:
    """Print rank, alpha, targets, where it comes from, and how large its updates are, block by block."""
    adapter = read_source(config.adapter, config)
    num_numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    print(f"{config.adapter}: LoRA rank {adapter.rank}, alpha {adapter.alpha:g}, {num_numbers:,} numbers")
    targets = dict.fromkeys(BLOCK.sub("{n}", target) for target in adapter.targets)
    print(f"targets, {len(adapter.modules)} Linears: {', '.join(targets)}")
    for name, value in sorted(adapter.provenance.items()):
        print(f"  {name}: {value}")
    if not adapter.provenance:
        print("  where it comes from is not stated")
    squares: dict[str, float] = {}
    for module, norm in norms(adapter).items():
        number = BLOCK.search(module)
        place = f"block {number[0]}" if number else module
        squares[place] = squares.get(place, 0.0) + norm**2
    print(f"Frobenius norm of the update, {sum(squares.values()) ** 0.5:.4g} in sum:")
    for line in bar_chart({place: square**0.5 for place, square in squares.items()}):
        print(line)


def bar_chart(values: dict[str, float]) -> list[str]:
    """A line a value, as wide as the terminal."""
    label, most = max(map(len, values)), max(values.values())
    room = max(10, min(100, shutil.get_terminal_size().columns) - label - 12)
    lengths = {name: round(room * value / most) if most else 0 for name, value in values.items()}
    return [f"{name:>{label}} {value:9.4g} {'█' * lengths[name]}".rstrip() for name, value in values.items()]


def convert(config: AdapterConvert) -> None:
    """Write the same adapter in another format, with a card if that is asked for."""
    adapter, target = read_source(config.adapter, config), Path(config.output)
    check_card(target, config)
    _write(config.output, config.format.value, adapter, [config.adapter])
    if config.card or config.push:
        lora = LoraExtension(adapter.rank, adapter.alpha, adapter.targets)
        trained = Trained(lora, adapter.tensors, adapter.provenance)
        finish_card(target, config.format, config, trained, {"trained": lora.describe()}, "")


def diff(config: AdapterDiff) -> None:
    """Print how far the updates of two adapters are apart."""
    measured = adapter_math.differences(read_source(config.adapter, config), read_source(config.other, config))
    print(f"norm of the difference of the updates, relative to {config.adapter}:")
    _print_errors(measured)


def average(config: AdapterAverage) -> None:
    """Write the mean of several adapters."""
    adapters = [read_source(source, config) for source in config.adapters]
    if len(adapters) < 2:
        raise UserError(f"adapters={config.adapters}: a mean is of two or more")
    shares = _ema_shares(config, adapters) or config.shares or [1 / len(adapters)] * len(adapters)
    if len(shares) != len(adapters) or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"shares={config.shares}: must be {len(adapters)} numbers, one an adapter, that add up to 1")
    if config.of is AverageOf.factors:
        if config.rank is not None:
            raise UserError(f"rank={config.rank}: means of A and B keep their rank; use of=updates, or resize the mean")
        measured = adapter_math.average_factors(adapters, shares)
    else:
        rank = config.rank or max(adapter.rank for adapter in adapters)
        measured = adapter_math.average_updates(adapters, shares, rank)
    note = {"average_of": [Path(source).name for source in config.adapters], "shares": list(shares)}
    made = replace(measured.adapter, provenance=measured.adapter.provenance | note)
    _write(config.output, config.format.value, made, config.adapters)
    print(f"from the mean of the updates it is {measured.error:.3g}, relative to that")


def _ema_shares(config: AdapterAverage, adapters: Sequence[Adapter]) -> list[float]:
    """Of points of one run: how much of each a moving average would hold at the last of them; empty if not asked for.

    A point stands for the steps since the one before it, and the first for all of its steps.
    """
    if config.ema_steps is None:
        return []
    if config.shares:
        raise UserError(f"ema_steps={config.ema_steps:g}: gives the shares; leave shares={config.shares} out")
    steps = [int(adapter.provenance.get("steps", -1)) for adapter in adapters]
    if -1 in steps or len(set(steps)) < len(steps):
        raise UserError(f"ema_steps={config.ema_steps:g}: needs points of one run; the adapters are of steps {steps}")
    order = sorted(range(len(steps)), key=lambda index: steps[index])
    last, shares, before = steps[order[-1]], [0.0] * len(steps), 0.0
    for index in order:
        so_far = math.exp((steps[index] - last) / config.ema_steps)
        shares[index], before = so_far - before, so_far
    return shares


def resize(config: AdapterResize) -> None:
    """Write the adapter with another rank."""
    adapter = read_source(config.adapter, config)
    measured = adapter_math.resized(adapter, config.rank)
    made = replace(measured.adapter, provenance=adapter.provenance | {"resized_from_rank": adapter.rank})
    _write(config.output, config.format.value, made, [config.adapter])
    print("error of the updates, relative to those before:")
    _print_errors(measured)


def merge_into(config: AdapterMerge) -> None:
    """Write the base model's network with the adapter in its weights."""
    known = known_family(config.model_path)
    if known is not None:
        config = replace(config, family=known.name)
    adapter = read_source(config.adapter, config)
    parts = (known.subfolder,) if known else ("transformer",)
    model_path = resolve_model_path(config.model_path, config.model_revision, parts)
    family = backbone_family(model_path)
    folder = merge(adapter, family, model_path, Path(config.output), config.strength)
    print(f"{folder}: bf16, {len(adapter.modules)} updates at strength {config.strength:g}")


def _write(output: str, format: str, adapter: Adapter, sources: Sequence[str]) -> None:
    path = Path(output)
    read = [file for source in map(Path, sources) for file in ([source] if source.is_file() else source.rglob("*"))]
    refuse_inputs("output", [path], {"adapter": read})
    # What was stated of the file that was read; the new one has its own.
    provenance = {k: v for k, v in adapter.provenance.items() if k not in ("rank", "alpha", "adapter_format")}
    write_adapter(path, format, adapter.tensors, adapter.rank, adapter.alpha, adapter.targets, provenance)
    print(f"{path}: {format}, LoRA rank {adapter.rank}, alpha {adapter.alpha:g}, {path.stat().st_size / 1e9:.3g} GB")


def _print_errors(measured: Measured) -> None:
    for module, error in measured.error_by_module.items():
        print(f"  {error:.3e}  {module}")
    print(f"  {measured.error:.3e}  in sum")


ACTIONS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "inspect": (AdapterInspect, inspect),
    "convert": (AdapterConvert, convert),
    "diff": (AdapterDiff, diff),
    "average": (AdapterAverage, average),
    "resize": (AdapterResize, resize),
    "merge": (AdapterMerge, merge_into),
}


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in ("--help", "-h"):
        print(USAGE, end="")
        return
    if word not in ACTIONS:
        print(f"error: {word!r} is none of {', '.join(ACTIONS)}; --help shows each", file=sys.stderr)
        raise SystemExit(USER_ERROR_STATUS)
    del sys.argv[1]
    config_class, run = ACTIONS[word]
    run_command(config_class, run, f"adapter_{word}", USAGE)


if __name__ == "__main__":
    main()
