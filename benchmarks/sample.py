"""Sampling, side by side: ours and diffusers' CogVideoXPipeline, denoising steps and the decoding of their latents.

    python benchmarks/sample.py                    full-size CogVideoX-5B on the first GPU, 49 and 129 frames of 480x720
    python benchmarks/sample.py device=cpu         a small model the same way, in fp32
    python benchmarks/sample.py frames=49 steps=10 repeats=5 output=benchmarks/results/sample

Both sides hold the same random weights and must give the same latents and the same frames before anything is timed.
They take turns within one process; medians go to OUTPUT.md, all figures to OUTPUT.json (benchmarks/results/sample, or
sample_gpu for a GPU). Peak memory is what the step needs beside both sides' weights: the allocator's on a GPU, the
bytes of live tensors on a CPU. What runs out of memory is a row that says OOM.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from step import DTYPE, FULL_SIZE, GIB, SMALL, SMALL_SIZE, machine
from torch import Tensor

from exvideo_train.config.experiment import AttentionKernel
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_json, atomic_write_text
from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox import published
from exvideo_train.models.cogvideox.sampler import draw
from exvideo_train.models.registry import FAMILIES
from exvideo_train.models.stages import SamplerSettings, VideoEncoder
from exvideo_train.parallel.attention import choose_attention
from exvideo_train.planning.trace import CostCounter

DEFAULTS = {"device": "cuda", "frames": "49,129", "steps": "4", "repeats": "", "output": ""}
SMALL_VAE = {"block_out_channels": (32, 64, 64, 128), "layers_per_block": 1}
GUIDANCE, SEED = 7.0, 6
THEIRS = "diffusers"


@dataclasses.dataclass
class Row:
    """One way to do one thing at one length; seconds are of a denoising step, or of decoding a whole video."""

    frames: int
    what: str
    name: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_gib: float | None = None
    failure: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds and not self.failure else None


class Benchmark:
    """Both sides, on one device; ``folder`` takes the small files that ours are loaded from."""

    def __init__(self, device: torch.device, folder: Path, num_steps: int) -> None:
        import diffusers as library

        diffusers: Any = library
        self.device, self.folder, self.num_steps = device, folder, num_steps
        self.on_gpu = device.type == "cuda"
        self.dtype = DTYPE if self.on_gpu else torch.float32
        family = FAMILIES[0]
        config: Any = family.published_config("zai-org/CogVideoX-5b")
        self.config: Any = config if self.on_gpu else dataclasses.replace(config, **SMALL)
        torch.manual_seed(SEED)
        torch.set_default_dtype(self.dtype)
        with torch.device(device):
            self.network: Any = family.build(self.config).eval()
            transformer: Any = diffusers.CogVideoXTransformer3DModel(**dataclasses.asdict(self.config)).eval()
            vae: Any = diffusers.AutoencoderKLCogVideoX(**({} if self.on_gpu else SMALL_VAE)).eval()
        torch.set_default_dtype(torch.float32)
        transformer.load_state_dict(self.network.state_dict())
        atomic_write_json(folder / "scheduler" / "scheduler_config.json", published.SCHEDULER_5B)
        vae.register_to_config(scaling_factor=0.7)
        vae.save_pretrained(folder / "vae")
        scheduler = diffusers.CogVideoXDDIMScheduler.from_config(published.SCHEDULER_5B, timestep_spacing="trailing")
        self.pipeline: Any = diffusers.CogVideoXPipeline(None, None, vae, transformer, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        attentions: list[Any] = [module for module in self.network.modules() if hasattr(module, "attend")]
        kernel = choose_attention(
            AttentionKernel.auto, device, self.dtype, attentions[0].num_heads, attentions[0].head_dim
        )
        for attention in attentions:
            attention.attend = kernel[0]
        self.kernel = kernel[1]
        self.encoders: dict[bool, VideoEncoder] = {
            tiling: family.video_encoder()(folder, device, self.dtype, tiling) for tiling in (False, True)
        }
        shape = (1, self.config.max_text_seq_length, self.config.text_embed_dim)
        self.text_BLC, self.empty_BLC = torch.randn(2, *shape, device=device, dtype=self.dtype)

    def geometry(self, frames: int) -> Geometry:
        height, width = FULL_SIZE if self.on_gpu else SMALL_SIZE
        return Geometry(frames, height, width, 8)

    def their_latents(self, geometry: Geometry) -> Tensor:
        latents: Tensor = self.pipeline(
            prompt_embeds=self.text_BLC,
            negative_prompt_embeds=self.empty_BLC,
            num_frames=geometry.num_frames,
            height=geometry.height,
            width=geometry.width,
            num_inference_steps=self.num_steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).frames
        return latents

    def our_latents(self, geometry: Geometry, batched: bool) -> Tensor:
        settings = SamplerSettings("ddim", self.num_steps, GUIDANCE, batched_guidance=batched)
        wanted, unwanted = {"text_BLC": self.text_BLC}, {"text_BLC": self.empty_BLC}
        return draw(self.network, self.folder, geometry, wanted, unwanted, settings, SEED, lambda: None)

    @torch.no_grad()
    def their_frames(self, latents_1TCHW: Tensor, tiling: bool) -> Tensor:
        self.pipeline.vae.enable_tiling() if tiling else self.pipeline.vae.disable_tiling()
        video = self.pipeline.decode_latents(latents_1TCHW.to(self.device, self.dtype))
        frames: Tensor = self.pipeline.video_processor.postprocess_video(video, output_type="pt")[0]
        return frames.cpu()

    def our_frames(self, latents_1TCHW: Tensor, tiling: bool) -> list[Tensor]:
        """As the mp4's encoder takes them: none is kept longer than it needs."""
        return [frames_FHWC[0, :1, :1] for frames_FHWC, _ in self.encoders[tiling].decode(latents_1TCHW[0])]

    def check_same_work(self) -> dict[str, float]:
        """On a short video; raises AssertionError when latents or frames differ."""
        geometry = Geometry(17, SMALL_SIZE[0], SMALL_SIZE[1], 8)
        ours, theirs = self.our_latents(geometry, True), self.their_latents(geometry)
        of_latents = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        frames = torch.cat([frames for frames, _ in self.encoders[False].decode(theirs[0])]).permute(0, 3, 1, 2)
        of_frames = float((frames.float() - self.their_frames(theirs, False).float() * 255).abs().max())
        assert of_latents < (0.05 if self.on_gpu else 1e-4), of_latents
        assert of_frames <= 1.0, of_frames
        return {"latents, relative": of_latents, "frames, of 255": of_frames}

    def run(self, frames: int, repeats: int) -> list[Row]:
        """All rows of one length, taking turns."""
        geometry = self.geometry(frames)
        latents = torch.randn(1, *self._latent_shape(geometry), generator=torch.Generator().manual_seed(SEED)) * 0.7
        step, decode = "denoising step", "decoding"
        ways: list[tuple[Row, int, Callable[[], Any]]] = [
            (Row(frames, step, THEIRS), self.num_steps, lambda: self.their_latents(geometry)),
            (Row(frames, step, "ours"), self.num_steps, lambda: self.our_latents(geometry, True)),
            (Row(frames, step, "ours, batched_guidance=false"), self.num_steps,
             lambda: self.our_latents(geometry, False)),
            (Row(frames, decode, THEIRS), 1, lambda: self.their_frames(latents, False)),
            (Row(frames, decode, "ours"), 1, lambda: self.our_frames(latents, False)),
            (Row(frames, decode, f"{THEIRS}, tiles"), 1, lambda: self.their_frames(latents, True)),
            (Row(frames, decode, "ours, vae_tiling=true"), 1, lambda: self.our_frames(latents, True)),
        ]  # fmt: skip
        # The first turn warms up and measures memory.
        for turn in range(-1, repeats):
            for row, parts, work in ways:
                if not row.failure:
                    self._turn(row, parts, work, turn)
            print(f"{frames} frames: turn {turn + 1} of {repeats}", file=sys.stderr, flush=True)
        return [row for row, _, _ in ways]

    def _latent_shape(self, geometry: Geometry) -> tuple[int, int, int, int]:
        frames, rows, columns = FAMILIES[0].grid.shape_THW(geometry)
        return frames, self.config.in_channels, rows, columns

    def _turn(self, row: Row, parts: int, work: Callable[[], Any], turn: int) -> None:
        try:
            if turn < 0:
                row.peak_gib = self._peak_bytes(work) / GIB
                return
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            row.seconds.append((time.perf_counter() - started) / parts)
        except (torch.OutOfMemoryError, UserError):
            row.failure = "OOM"
            gc.collect()
            torch.cuda.empty_cache()

    def _peak_bytes(self, work: Callable[[], Any]) -> int:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            work()
            return torch.cuda.max_memory_allocated(self.device) - before
        with CostCounter() as meter:
            work()
        return meter.peak_bytes

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def markdown(rows: Sequence[Row], about: dict[str, Any], same: dict[str, float]) -> str:
    """The table, headed by machine, versions, commit and command."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Sampling",
        "",
        f"{about['device']}, {about['threads']} threads, load {about['load_average']}; Python {about['python']}, "
        f"{versions}; commit {about['commit']}",
        "",
        f"    {about['command']}",
        "",
        "Before: " + ", ".join(f"{what} differ by {value:.2g}" for what, value in same.items()) + ".",
        "",
        "| frames | what | whose | seconds (median) | of diffusers | peak GiB beside weights | of diffusers |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        base = next(other for other in rows if (other.frames, other.what) == (row.frames, row.what))
        if row.median is None:
            lines.append(f"| {row.frames} | {row.what} | {row.name} | {row.failure} | | | |")
            continue
        ratios = [f"{mine / theirs:.2f}" if mine and theirs else ""
                  for mine, theirs in ((row.median, base.median), (row.peak_gib, base.peak_gib))]  # fmt: skip
        lines.append(
            f"| {row.frames} | {row.what} | {row.name} | {row.median:.3f} | {ratios[0]} | {row.peak_gib:.3f} | "
            f"{ratios[1]} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if unknown := given.keys() - DEFAULTS.keys():
        raise UserError(f"unknown option {min(unknown)!r}; options are {', '.join(DEFAULTS)}, as name=value")
    options = {**DEFAULTS, **given}
    device = torch.device(options["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={options['device']}: no GPU is here; device=cpu measures a small model")
    repeats = int(options["repeats"] or (5 if device.type == "cuda" else 3))
    about = machine(device, given, "benchmarks/sample.py")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        benchmark = Benchmark(device, Path(folder), int(options["steps"]))
        same = benchmark.check_same_work()
        rows = [row for frames in options["frames"].split(",") for row in benchmark.run(int(frames), repeats)]
    table = markdown(rows, about, same)
    print(table)
    output = Path(options["output"] or f"benchmarks/results/sample{'_gpu' if device.type == 'cuda' else ''}")
    content = {
        **about,
        "kernel": benchmark.kernel,
        "same_work": same,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    atomic_write_json(output.with_suffix(".json"), content)
    atomic_write_text(output.with_suffix(".md"), table)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
