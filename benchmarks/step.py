"""One training step, side by side: ours and what users run today (diffusers + PEFT + its gradient checkpointing).

    python benchmarks/step.py                      full-size CogVideoX-5B on the first GPU, 49 and 129 frames of 480x720
    python benchmarks/step.py device=cpu           a small model the same way
    python benchmarks/step.py frames=49 repeats=20 output=benchmarks/results/step
    python benchmarks/step.py only=diffusers,recompute=full,129f_24g           rows whose names hold one of these

Both hold the same random weights (copied, made on the device), the same LoRA, bf16 frozen weights, fp32 LoRA, bf16
autocast and torch's AdamW, and are checked to give the same loss and the same gradient norm before anything is timed.
The compared runs take turns within one process; a table of medians goes to OUTPUT.md and all figures to OUTPUT.json
(benchmarks/results/step, or step_gpu for a GPU).
What runs out of memory is a row that says OOM. FLOPs are exact (exvideo_train.planning.trace); TFLOP/s counts what is
executed, recomputation included, MFU only what any implementation must compute. "By plan" is the peak that the plan
says of the same step, without the attention kernel's own workspace.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exvideo_train.config.experiment import LORA_TARGETS, AttentionKernel, MemoryConfig, Recompute
from exvideo_train.errors import UserError
from exvideo_train.extensions.lora import LoraExtension
from exvideo_train.files import atomic_write_json, atomic_write_text
from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox.family import GRID
from exvideo_train.models.noise_levels import squared_error
from exvideo_train.models.registry import FAMILIES
from exvideo_train.parallel.activation_checkpointing import HostMemory, block_runner
from exvideo_train.parallel.attention import choose_attention
from exvideo_train.parallel.hardware import device_peak_flops
from exvideo_train.parallel.parallelize import run_in_chunks
from exvideo_train.planning.trace import CostCounter, StepTrace, TracedKernel, Work, trace_step

GIB = 2**30
DTYPE = torch.bfloat16
DEFAULTS = {"device": "cuda", "frames": "49,129", "repeats": "", "output": "", "model": "5b", "only": ""}
# On a CPU: the same layers, narrow and few, on small frames.
SMALL = {"num_layers": 4, "num_attention_heads": 4, "text_embed_dim": 256, "time_embed_dim": 128}
SMALL_SIZE, FULL_SIZE = (64, 96), (480, 720)
# Below a CPU's table, which is no substitute for it.
NO_GPU = """
Two rows are the same work under two names, `recompute=full` and `recompute=full, attention=flash`: by how much they
differ is the noise of this table.

## GPU, full-size CogVideoX-5B, 49 and 129 frames of 480x720

not measured
"""
SMALL_RANK, FULL_RANK = 8, 64


@dataclasses.dataclass
class Batch:
    """What a step reads: noisy latents and target (B, T, C, H, W) in fp32, text (B, L, C), timesteps (B)."""

    noisy_BTCHW: Tensor
    target_BTCHW: Tensor
    text_BLC: Tensor
    timesteps_B: Tensor


@dataclasses.dataclass
class Row:
    """One contestant at one length."""

    frames: int
    name: str
    kernel: str = ""
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    peak_gib: float | None = None
    planned_gib: float | None = None
    moved_gib: float = 0.0
    flops: int = 0
    necessary_flops: int = 0
    failure: str = ""
    reason: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.step_seconds) if self.step_seconds and not self.failure else None

    def ratio(self, base: Row) -> float | None:
        """To the same turns of another row: by processor time where that was taken, which other load disturbs less."""
        mine, theirs = self.cpu_seconds or self.step_seconds, base.cpu_seconds or base.step_seconds
        if self.median is None or base.median is None:
            return None
        return statistics.median(mine) / statistics.median(theirs)


def lora_of(rank: int) -> LoraExtension:
    return LoraExtension(rank, float(rank), tuple(LORA_TARGETS))


class Contestant:
    """A network with its optimizer; ``predict`` gives the velocity."""

    def __init__(self, model: nn.Module, predict: Callable[[Batch], Tensor], device: torch.device) -> None:
        self.model, self.predict, self.device = model, predict, device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(parameter.dtype == torch.float32 for parameter in self.trained)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=device.type == "cuda")

    def step(self, batch: Batch) -> float:
        """One whole training step; returns the loss, which waits for the device."""
        with torch.autocast(self.device.type, dtype=DTYPE):
            loss = squared_error(self.predict(batch), batch.target_BTCHW).mean
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def gradient_norm(self, batch: Batch) -> tuple[float, float]:
        """(loss, norm of all gradients) without an update."""
        with torch.autocast(self.device.type, dtype=DTYPE):
            loss = squared_error(self.predict(batch), batch.target_BTCHW).mean
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in self.trained if p.grad is not None]).norm()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    @property
    def held_bytes(self) -> int:
        """Weights and optimizer states: what the other contestant's presence adds to a peak."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *(value for value in states if isinstance(value, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def fresh_on(device: torch.device) -> Iterator[None]:
    """Parameters are made on the device, in bf16."""
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def make_ours(config: Any, rank: int, device: torch.device) -> Contestant:
    with fresh_on(device):
        model = FAMILIES[0].build(config)
    lora_of(rank).attach(model, seed=0)
    model.train()
    return Contestant(model, lambda batch: model(batch.noisy_BTCHW, batch.timesteps_B, batch.text_BLC), device)


def make_theirs(config: Any, rank: int, device: torch.device, ours: nn.Module) -> Contestant:
    """diffusers' transformer with PEFT's adapter and its own checkpointing, holding the weights of ours."""
    import diffusers
    import peft

    with fresh_on(device):
        model: Any = diffusers.CogVideoXTransformer3DModel(**dataclasses.asdict(config))
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    missing, unexpected = model.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected, unexpected[:3]
    assert not any(name in dict(model.named_parameters()) for name in missing), missing[:3]
    model.enable_gradient_checkpointing()
    model.train()
    tables: dict[tuple[int, ...], Any] = {}

    def predict(batch: Batch) -> Tensor:
        shape = tuple(batch.noisy_BTCHW.shape)
        if shape not in tables:
            tables[shape] = _rotary(config, shape, device)
        output: Tensor = model(
            hidden_states=batch.noisy_BTCHW.to(DTYPE),
            encoder_hidden_states=batch.text_BLC.to(DTYPE),
            timestep=batch.timesteps_B,
            image_rotary_emb=tables[shape],
            return_dict=False,
        )[0]
        return output

    return Contestant(model, predict, device)


def _rotary(config: Any, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """As CogVideoXPipeline prepares them: the grid resized and cropped to the base size."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    _, num_frames, _, height, width = shape
    grid = (height // config.patch_size, width // config.patch_size)
    base = (config.sample_width // config.patch_size, config.sample_height // config.patch_size)
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        crops_coords=get_resize_crop_region_for_grid(grid, *base),
        grid_size=grid,
        temporal_size=num_frames,
        device=device,
    )
    return cos, sin


def make_batch(config: Any, geometry: Geometry, device: torch.device) -> Batch:
    torch.manual_seed(0)
    frames, rows, columns = GRID.shape_THW(geometry)
    shape = (1, frames, config.in_channels, rows, columns)
    return Batch(
        torch.randn(shape, device=device),
        torch.randn(shape, device=device),
        torch.randn(1, config.max_text_seq_length, config.text_embed_dim, device=device),
        torch.tensor([500], device=device),
    )


def set_form(model: nn.Module, memory: MemoryConfig, device: torch.device) -> str:
    """Hang recomputation, its levers and the kernel on our network; returns the kernel that runs.

    Raises:
        UserError: the kernel does not run here.
    """
    attentions: list[Any] = [module for module in model.modules() if hasattr(module, "attend")]
    heads, dim = attentions[0].num_heads, attentions[0].head_dim
    attend, name = choose_attention(memory.attention, device, DTYPE, heads, dim)
    for attention in attentions:
        attention.attend = attend
    for module in model.modules():
        if hasattr(module, "run_by_token"):
            module.run_by_token = _call  # type: ignore[assignment]
    run_in_chunks(model, memory.feed_forward_chunks)
    inputs_on = HostMemory() if memory.offload_activations else None
    model.run_block = block_runner(memory.recompute, False, inputs_on) or _call  # type: ignore[assignment]
    for block in model.blocks:  # type: ignore[union-attr, operator]
        block._compiled_call_impl = None
        if memory.compile:
            block.compile()
    return name


def _call(module: nn.Module, *args: Any) -> Tensor:
    output: Tensor = module(*args)
    return output


def _full(**options: Any) -> MemoryConfig:
    return MemoryConfig(recompute=Recompute.full, **options)


# What is measured by name; None is diffusers. Compiling takes minutes on a CPU, and says nothing of a GPU.
FORMS: dict[str, MemoryConfig | None] = {
    "diffusers + PEFT, its checkpointing": None,
    "ours, recompute=full": _full(),
    "ours, recompute=keep_attention": MemoryConfig(recompute=Recompute.keep_attention),
    "ours, recompute=none": MemoryConfig(recompute=Recompute.none),
    "ours, as 129f_48g": MemoryConfig(recompute=Recompute.keep_attention, offload_activations=True),
    "ours, as 129f_24g": _full(offload_activations=True, feed_forward_chunks=8),
    "ours, recompute=full, attention=flash": _full(attention=AttentionKernel.flash),
    "ours, recompute=full, attention=cudnn": _full(attention=AttentionKernel.cudnn),
    "ours, recompute=full, attention=flash_attn": _full(attention=AttentionKernel.flash_attn),
    "ours, recompute=full, attention=math": _full(attention=AttentionKernel.math),
}
ON_GPU_ALONE: dict[str, MemoryConfig | None] = {
    "ours, recompute=full, compile": _full(compile=True),
    "ours, recompute=keep_attention, compile": MemoryConfig(recompute=Recompute.keep_attention, compile=True),
}
THEIRS, PLAIN = list(FORMS)[:2]


class Benchmark:
    """Both networks, and the rows that come of them."""

    def __init__(self, device: torch.device, model_name: str, only: Sequence[str]) -> None:
        self.device, self.only = device, only
        self.on_gpu = device.type == "cuda"
        self.config = FAMILIES[0].published_config(f"zai-org/CogVideoX-{model_name}")
        if self.config is None or not self.config.use_rotary_positional_embeddings:
            raise UserError(f"model={model_name}: only 5b can be measured")
        if not self.on_gpu:
            self.config = dataclasses.replace(self.config, **SMALL)
        self.rank = FULL_RANK if self.on_gpu else SMALL_RANK
        self.ours = make_ours(self.config, self.rank, device)
        self.theirs = make_theirs(self.config, self.rank, device, self.ours.model)

    def geometry(self, frames: int) -> Geometry:
        return Geometry(frames, *(FULL_SIZE if self.on_gpu else SMALL_SIZE), 8)

    def trace(self, frames: int, memory: MemoryConfig) -> StepTrace:
        """What a plan says of the step."""
        work = Work(
            family=FAMILIES[0],
            config=self.config,
            extension=lora_of(self.rank),
            geometry=self.geometry(frames),
            recompute=memory.recompute,
            offload_activations=memory.offload_activations,
            feed_forward_chunks=memory.feed_forward_chunks,
            kernel=TracedKernel.math if memory.attention is AttentionKernel.math else TracedKernel.fused,
        )
        return trace_step(work)

    def planned_gib(self, trace: StepTrace) -> float:
        """Peak by the plan: weights, gradients and optimizer of one contestant, and the trace's activations."""
        gradients = sum(parameter.numel() * 4 for parameter in self.ours.trained)
        return (self.ours.held_bytes + max(trace.forward_peak_bytes, trace.backward_peak_bytes + gradients)) / GIB

    def check_same_work(self) -> dict[str, float]:
        """Loss and gradient norm of both on a short sample; raises AssertionError when they differ."""
        set_form(self.ours.model, MemoryConfig(), self.device)
        batch = make_batch(self.config, Geometry(17, *SMALL_SIZE, 8), self.device)
        (loss, norm), (their_loss, their_norm) = (c.gradient_norm(batch) for c in (self.ours, self.theirs))
        figures = {"loss": loss, "diffusers_loss": their_loss, "norm": norm, "diffusers_norm": their_norm}
        assert abs(loss / their_loss - 1) < 0.01, figures
        assert abs(norm / their_norm - 1) < 0.05, figures
        return figures

    def run(self, frames: int, repeats: int) -> list[Row]:
        """All forms at one length, taking turns."""
        batch = make_batch(self.config, self.geometry(frames), self.device)
        forms = FORMS | ON_GPU_ALONE if self.on_gpu else FORMS
        forms = {name: memory for name, memory in forms.items() if any(word in name for word in self.only)}
        necessary = _flops(self.trace(frames, MemoryConfig(recompute=Recompute.none)))
        traces = {name: self.trace(frames, memory or MemoryConfig()) for name, memory in forms.items()}
        rows = [
            Row(frames, name, flops=_flops(trace), necessary_flops=necessary, moved_gib=trace.moved_bytes / GIB)
            for name, trace in traces.items()
        ]
        # The first two turns warm up and measure memory.
        for turn in range(-2, repeats):
            for row, memory in zip(rows, forms.values(), strict=True):
                if not row.failure:
                    self._turn(row, memory, batch, turn)
            print(f"{frames} frames: turn {turn + 1} of {repeats}", file=sys.stderr, flush=True)
        for row, memory in zip(rows, forms.values(), strict=True):
            # Of their step nothing is planned; what the compiler fuses, a plan does not see.
            if memory is not None and not memory.compile:
                row.planned_gib = self.planned_gib(traces[row.name])
        return rows

    def _turn(self, row: Row, memory: MemoryConfig | None, batch: Batch, turn: int) -> None:
        contestant, other = (self.theirs, self.ours) if memory is None else (self.ours, self.theirs)
        try:
            if memory is not None:
                row.kernel = set_form(contestant.model, memory, self.device)
            if turn < 0:
                row.peak_gib = self._peak_bytes(contestant, other, batch) / GIB
                return
            self._wait()
            started, cpu_started = time.perf_counter(), time.process_time()
            contestant.step(batch)
            self._wait()
            row.step_seconds.append(time.perf_counter() - started)
            if not self.on_gpu:
                row.cpu_seconds.append(time.process_time() - cpu_started)
        except torch.OutOfMemoryError:
            row.failure = "OOM"
        except UserError as error:
            row.failure = "not available"
            row.reason = str(error)
        finally:
            contestant.optimizer.zero_grad(set_to_none=True)
        if row.failure and self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def _peak_bytes(self, contestant: Contestant, other: Contestant, batch: Batch) -> int:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            contestant.step(batch)
            return torch.cuda.max_memory_allocated(self.device) - other.held_bytes
        with CostCounter() as meter:
            contestant.step(batch)
        return meter.peak_bytes + contestant.held_bytes

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def _flops(trace: StepTrace) -> int:
    return trace.forward_flops + trace.backward_flops


def machine(device: torch.device, options: dict[str, str], script: str = "benchmarks/step.py") -> dict[str, Any]:
    """What the figures were measured on."""
    repository = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=False)
    threads = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS",) if name in os.environ]
    packages = ("torch", "diffusers", "peft", "transformers")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip() or None,
        "command": " ".join([*threads, "python", script, *(f"{name}={value}" for name, value in options.items())]),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor()


def markdown(rows: Sequence[Row], about: dict[str, Any], peak_flops: float | None) -> str:
    """The table, headed by machine, versions, commit and command."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['device']}, {about['threads']} threads, load {about['load_average']}; Python {about['python']}, "
        f"{versions}; commit {about['commit']}",
        "",
        f"    {about['command']}",
        "",
        "Seconds are wall clock; the ratio is that of the medians"
        + (" of processor time, all threads." if any(row.cpu_seconds for row in rows) else "."),
        "",
        "| frames | step | kernel | s/step (median) | of diffusers | TFLOP/s | MFU | peak GiB | by plan |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.median is None:
            lines.append(f"| {row.frames} | {row.name} | {row.kernel} | {row.failure} | | | | | |")
            continue
        base = next(other for other in rows if other.frames == row.frames and other.name == THEIRS)
        ratio = row.ratio(base)
        mfu = f"{row.necessary_flops / row.median / peak_flops:.0%}" if peak_flops else ""
        lines.append(
            f"| {row.frames} | {row.name} | {row.kernel} | {row.median:.3f} | "
            f"{'' if ratio is None else format(ratio, '.2f')} | "
            f"{row.flops / row.median / 1e12:.3g} | {mfu} | {row.peak_gib:.2f} | "
            f"{'' if row.planned_gib is None else format(row.planned_gib, '.2f')} |"
        )
    return "\n".join(lines) + "\n"


def read_options(arguments: Sequence[str]) -> dict[str, str]:
    """``name=value`` arguments over the defaults.

    Raises:
        UserError: an unknown name.
    """
    given = {}
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not separator or name not in DEFAULTS:
            raise UserError(f"unknown option {argument!r}; options are {', '.join(DEFAULTS)}, as name=value")
        given[name] = value
    return given


def main(arguments: Sequence[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return
    given = read_options(arguments)
    options = {**DEFAULTS, **given}
    device = torch.device(options["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={options['device']}: no GPU is here; device=cpu measures a small model")
    lengths = [int(frames) for frames in options["frames"].split(",")]
    benchmark = Benchmark(device, options["model"], options["only"].split(","))
    same_work = benchmark.check_same_work()
    repeats = int(options["repeats"] or (10 if device.type == "cuda" else 7))
    about = machine(device, given)
    rows = [row for frames in lengths for row in benchmark.run(frames, repeats)]
    table = markdown(rows, about, device_peak_flops(device))
    print(table)
    output = Path(options["output"] or f"benchmarks/results/step{'_gpu' if device.type == 'cuda' else ''}")
    content = {**about, "same_work": same_work, "repeats": repeats, "rows": [_as_json(row) for row in rows]}
    atomic_write_json(output.with_suffix(".json"), content)
    atomic_write_text(output.with_suffix(".md"), "# Training step\n\n" + table + ("" if benchmark.on_gpu else NO_GPU))


def _as_json(row: Row) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "median_seconds": row.median}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
