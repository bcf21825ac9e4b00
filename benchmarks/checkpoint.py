"""Size, save stall and load time of a checkpoint of CogVideoX-5B's rank-64 adapter, with its real names and shapes.

    python benchmarks/checkpoint.py --folder FOLDER

One process holds the trained parameters alone (no backbone) in the training engine, on the GPU if there is one, with
random values, moments and moving average. The stall is what the training step waits for; the rest happens behind it.
Prints a Markdown table and writes benchmarks/results/checkpoint.md and .json.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from exvideo_train.config.experiment import Experiment
from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_parameters
from exvideo_train.extensions.provenance import source_commit
from exvideo_train.models.cogvideox import published
from exvideo_train.models.cogvideox.network import CogVideoXDiT
from exvideo_train.models.cogvideox.weights import config_from_fields
from exvideo_train.parallel.engine import EMA, MOMENTS, TrainingEngine
from exvideo_train.parallel.mesh import init_mesh
from exvideo_train.training.checkpoint import CheckpointWriter, TrainingState, load_checkpoint, step_folder

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT_GB = 4.1


class TrainedOnly(nn.Module):
    """The adapter's parameters without a backbone."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)


def adapter_parameters(rank: int, device: torch.device) -> dict[str, nn.Parameter]:
    """The trained parameters of CogVideoX-5B by published name, filled with random numbers."""
    with torch.device("meta"):
        backbone = CogVideoXDiT(config_from_fields(published.TRANSFORMER_5B, "published"))
    config = Experiment()
    apply_lora(backbone, LoraExtension(rank, float(rank), tuple(config.lora.targets)), config.seed)
    shapes = {name: parameter.shape for name, parameter in lora_parameters(backbone).items()}
    return {name: nn.Parameter(torch.randn(shape, device=device)) for name, shape in shapes.items()}


def build_engine(rank: int) -> TrainingEngine:
    config = Experiment()
    config.lora.rank = rank
    config.optim.ema_decay = 0.999
    mesh = init_mesh(1, 600.0)
    parameters = adapter_parameters(rank, mesh.device)
    engine = TrainingEngine(TrainedOnly(parameters), parameters, config, mesh, "lora")
    states = engine._zero.optimizer.state
    for shard in engine._partitions():
        for key in (*MOMENTS, EMA):
            states[shard][key].normal_()
    return engine


def measure(folder: Path, rank: int, repetitions: int) -> dict[str, float]:
    engine = build_engine(rank)
    figures: dict[str, list[float]] = {}

    def note(name: str, started: float) -> None:
        figures.setdefault(name, []).append(time.perf_counter() - started)

    said: list[str] = []
    writer = CheckpointWriter(folder, keep_last=1, keep_every=0, log=said.append)
    for step in range(1, repetitions + 1):
        started = time.perf_counter()
        tensors = engine.gather_state()
        writer.save(TrainingState(step, step, step, 0, {}), tensors)
        note("save stall, s", started)
        writer.finish(raise_error=True)
        note("on disk after, s", started)
        del tensors
        path = step_folder(folder, step)
        started = time.perf_counter()
        checkpoint = load_checkpoint(path)
        note("checksums verified, s", started)
        started = time.perf_counter()
        assert len(checkpoint.tensors("lora")) == len(engine.trainable)
        files = {key: checkpoint.open(key) for key in engine.state_keys()[1:]}
        engine.load_optimizer_state(lambda key, name: files[key].get_tensor(name), step)  # noqa: B023
        note("read into the engine, s", started)
    assert not said, said
    num_bytes = sum(file.stat().st_size for file in path.iterdir())
    best = {name: min(values) for name, values in figures.items()}
    parameters = sum(parameter.numel() for parameter in engine.trainable.values())
    return {"parameters": parameters, "GB": num_bytes / 1e9, **best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: a temporary folder")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        figures = measure(folder, options.rank, options.repetitions)
    finally:
        shutil.rmtree(folder)
    table = report(figures, options)
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint.md").write_text(table)
    (RESULTS / "checkpoint.json").write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(0 if options.rank != 64 or figures["GB"] <= LIMIT_GB else 1)


def report(figures: dict[str, float], options: argparse.Namespace) -> str:
    import deepspeed
    import psutil

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory = psutil.virtual_memory().total / 2**30
    machine = f"{psutil.cpu_count()} cores {platform.machine()}, {memory:.0f} GiB, {device}"
    versions = f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, Python {platform.python_version()}"
    lines = [
        "# Checkpoint of CogVideoX-5B's adapter",
        "",
        "fp32 weights, moving average and two AdamW moments; nothing of the backbone. The training step waits for the",
        "stall; writing and checksums happen behind it. Best of the repetitions.",
        "",
        f"Rank {options.rank}, {figures['parameters']:,.0f} parameters, 1 process, ZeRO-2. {machine}. {versions}.",
        f"Commit {source_commit()}. `python benchmarks/checkpoint.py --repetitions {options.repetitions}`",
        "",
        "| " + " | ".join(name for name in figures if name != "parameters") + " |",
        "|" + "---|" * (len(figures) - 1),
        "| " + " | ".join(f"{value:.2f}" for name, value in figures.items() if name != "parameters") + " |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
