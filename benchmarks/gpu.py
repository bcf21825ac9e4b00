"""Everything that the first GPU can tell, by one command, in less than nine minutes.

    python benchmarks/gpu.py                       CogVideoX-5B at full size with random weights, on the first GPU
    python benchmarks/gpu.py sections=attention,step
    python benchmarks/gpu.py device=cpu            the same road at small size: it shows that the command works

Sections, in this order: versions as they are loaded; attention kernels forward and backward; `step.py` at 49 and at 129
frames with the plan's peaks beside the measured ones; what one block spends its time on; how often the compiler started
anew; the real commands (encoding, `deepspeed launch/train.py`, sampling) on random weights; `sample.py`.
A section that fails or runs out of memory is a line that says so; one for which no time is left is named. Writes
OUTPUT.md and OUTPUT.json (benchmarks/results/gpu).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from step import DTYPE, FULL_SIZE, SMALL, SMALL_SIZE, lora_of, machine, make_batch, set_form
from torch import Tensor

from exvideo_train.config.experiment import AttentionKernel, MemoryConfig
from exvideo_train.devices import cudnn_version
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_json, atomic_write_text
from exvideo_train.geometry import Geometry
from exvideo_train.models.registry import FAMILIES
from exvideo_train.parallel.attention import choose_attention

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULTS = {"device": "cuda", "minutes": "9", "sections": "", "output": "benchmarks/results/gpu"}
# Tokens of 49 and of 129 frames of 480x720, with the prompt's.
FULL_TOKENS, SMALL_TOKENS = (17_776, 44_776), (290, 610)
FULL_HEADS, SMALL_HEADS, HEAD_DIM = 48, 4, 64
TIMES = 3
Lines = list[str]


class Benchmark:
    """The sections; each returns lines of Markdown and JSON values."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.on_gpu = device.type == "cuda"
        self.geometry = Geometry(49 if self.on_gpu else 17, *(FULL_SIZE if self.on_gpu else SMALL_SIZE), 8)  # type: ignore[call-arg]

    def versions(self, seconds: float) -> tuple[Lines, Any]:
        found = {
            "torch": torch.__version__,
            "CUDA of torch": torch.version.cuda,
            "cuDNN as loaded": cudnn_version(),
            "memory, GiB": round(torch.cuda.get_device_properties(self.device).total_memory / 2**30, 1)
            if self.on_gpu
            else None,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
        return [f"- {name}: {value}" for name, value in found.items()], found

    def attention(self, seconds: float) -> tuple[Lines, Any]:
        """Seconds of each kernel at both lengths, and TFLOP/s."""
        lines = ["| tokens | asked for | kernel | forward, ms | backward, ms | TFLOP/s forward | backward |"]
        lines.append("|---:|---|---|---:|---:|---:|---:|")
        rows = []
        tokens, heads = (FULL_TOKENS, FULL_HEADS) if self.on_gpu else (SMALL_TOKENS, SMALL_HEADS)
        for length in tokens:
            for kernel in AttentionKernel:
                row = {"tokens": length, "asked": kernel.value, **self._attend(kernel, heads, length)}
                rows.append(row)
                if "why" in row:
                    lines.append(f"| {length:,} | {kernel.value} | {row['why']} | | | | |")
                    continue
                flops = 4 * length**2 * heads * HEAD_DIM
                forward, backward = row["forward_seconds"], row["backward_seconds"]
                lines.append(
                    f"| {length:,} | {kernel.value} | {row['kernel']} | {1e3 * forward:.1f} | {1e3 * backward:.1f} | "
                    f"{flops / forward / 1e12:.3g} | {2.5 * flops / backward / 1e12:.3g} |"
                )
        return lines, rows

    def _attend(self, kernel: AttentionKernel, heads: int, length: int) -> dict[str, Any]:
        try:
            attend, name = choose_attention(kernel, self.device, DTYPE, heads, HEAD_DIM)
            q, k, v = (
                torch.randn(1, length, heads, HEAD_DIM, device=self.device, dtype=DTYPE)
                .transpose(1, 2)
                .requires_grad_()
                for _ in range(3)
            )
            forward = self._median(lambda: attend(q, k, v))
            output = attend(q, k, v)
            gradient = torch.randn_like(output)
            backward = self._median(lambda: torch.autograd.grad(output, (q, k, v), gradient, retain_graph=True))
        except (UserError, torch.OutOfMemoryError) as error:
            return {"why": "out of memory" if isinstance(error, torch.OutOfMemoryError) else "not available"}
        return {"kernel": name, "forward_seconds": forward, "backward_seconds": backward}

    def _median(self, work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(TIMES + 1):
            self._wait()
            began = time.perf_counter()
            work()
            self._wait()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def step(self, seconds: float) -> tuple[Lines, Any]:
        """`step.py`: at 49 frames everything, at 129 what the recipes are made of."""
        began = time.monotonic()
        lines, values = [], []
        chosen = {"49": "", "129": "diffusers,recompute=full,recompute=keep_attention,129f_48g,129f_24g"}
        for frames, only in chosen.items() if self.on_gpu else [("9", "")]:
            output = self.folder / f"step_{frames}"
            options = [
                f"device={self.device.type}",
                f"frames={frames}",
                "repeats=1",
                f"output={output}",
                f"only={only}",
            ]
            found = self._script("step.py", options, output, seconds - (time.monotonic() - began))
            lines += found[0]
            values.append(found[1])
        return lines, values

    def sample(self, seconds: float) -> tuple[Lines, Any]:
        output = self.folder / "sample"
        frames = "129" if self.on_gpu else "9"
        options = [f"device={self.device.type}", f"frames={frames}", "steps=2", "repeats=1", f"output={output}"]
        return self._script("sample.py", options, output, seconds)

    def _script(self, name: str, options: Sequence[str], output: Path, seconds: float) -> tuple[Lines, Any]:
        _run([sys.executable, str(REPOSITORY / "benchmarks" / name), *options], seconds)
        table = [line for line in output.with_suffix(".md").read_text().splitlines() if line.startswith("|")]
        return [*table, ""], json.loads(output.with_suffix(".json").read_text())

    def block(self, seconds: float) -> tuple[Lines, Any]:
        """What one block's step spends its time on, and how often the compiler starts anew over two lengths."""
        from torch.profiler import ProfilerActivity, profile

        family = FAMILIES[0]
        config: Any = family.published_config("zai-org/CogVideoX-5b")
        config = dataclasses.replace(config, num_layers=2) if self.on_gpu else dataclasses.replace(config, **SMALL)
        with torch.device(self.device):
            network: Any = family.build(config).to(DTYPE)
        lora_of(64 if self.on_gpu else 8).attach(network, seed=0)
        network.train()

        def work(geometry: Geometry) -> Tensor:
            batch = make_batch(config, geometry, self.device)
            with torch.autocast(self.device.type, dtype=DTYPE):
                loss: Tensor = network(batch.noisy_BTCHW, batch.timesteps_B, batch.text_BLC).float().square().mean()
            loss.backward()
            return loss

        set_form(network, MemoryConfig(), self.device)
        work(self.geometry)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        with profile(activities=activities) as profiled:
            work(self.geometry)
            self._wait()
        attribute = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, attribute))
        total = sum(getattr(event, attribute) for event in events)
        lines = ["| kernel or operator | share | calls |", "|---|---:|---:|"]
        lines += [
            f"| `{event.key[:90]}` | {getattr(event, attribute) / total:.1%} | {event.count} |" for event in events[:15]
        ]
        values: dict[str, Any] = {event.key: getattr(event, attribute) for event in events[:40]}
        if self.on_gpu:
            from torch._dynamo.utils import counters

            counters.clear()
            set_form(network, MemoryConfig(compile=True), self.device)
            shorter = Geometry(self.geometry.num_frames - 16, self.geometry.height, self.geometry.width, 8)
            for geometry in (self.geometry, shorter, self.geometry):
                work(geometry)
            values["graphs"] = dict(counters["stats"])
            values["graph_breaks"] = dict(counters["graph_break"])
            lines += [
                "",
                f"Compiled, two lengths: {values['graphs']}, graph breaks: {values['graph_breaks'] or 'none'}",
            ]
        return lines, values

    def commands(self, seconds: float) -> tuple[Lines, Any]:
        """The commands that a user runs, with a model of random weights: seconds of each, loading included."""
        from exvideo_train.models.cogvideox.tiny import write_tiny_model

        model, at = self.folder / "model", self.folder
        write_tiny_model(model)
        if self.on_gpu:
            _grow(model, self.device)
        size = [
            f"num_frames={self.geometry.num_frames}",
            f"height={self.geometry.height}",
            f"width={self.geometry.width}",
        ]
        exp = ["+exp=49f" if self.on_gpu else "+exp=demo", f"model.path={model}", *size, "fps=24"]
        rows = [
            json.dumps({"YoutubeID": "bigbuckbunny", "Caption": f"a rabbit, take {n}",
                        "Start_timestamp": f"00:00:{n * 0.1:06.3f}", "End_timestamp": f"00:00:{n * 0.1 + 2.2:06.3f}"})
            for n in range(8)
        ]  # fmt: skip
        (at / "metadata.jsonl").write_text("\n".join(rows) + "\n")
        python, clips = sys.executable, f"manifest={at / 'clips.jsonl'}"
        store, run = f"latents={at / 'latents'}", f"run_dir={at / 'run'}"
        steps = ["max_steps=4", "data.held_out_clips=0", "validation.every_steps=0", "logger.log_every_steps=1"]
        todo = {
            "manifest": [python, "data_prep/build_manifest.py", "source=internvid", clips,
                         f"metadata={at / 'metadata.jsonl'}", f"videos={REPOSITORY / 'examples' / 'clips'}"],
            "encode 8 clips": [python, "data_prep/encode_latents.py", *exp, clips, store, f"device={self._name()}"],
            "train 4 steps": [python, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "launch/train.py", *exp,
                              store, run, *steps],
            "sample 10 steps": [python, "-m", "exvideo_train.sample", *exp, "prompt=a rabbit",
                                "num_inference_steps=10", f"adapter={at / 'run' / 'adapter.safetensors'}",
                                f"output={at / 'videos'}", f"device={self._name()}"],
        }  # fmt: skip
        lines = ["| command | seconds |", "|---|---:|"]
        values: dict[str, Any] = {}
        began = time.monotonic()
        for name, command in todo.items():
            started = time.monotonic()
            _run(command, seconds - (started - began))
            values[name] = time.monotonic() - started
            lines.append(f"| {name} | {values[name]:.1f} |")
        records = [json.loads(line) for line in (at / "run" / "metrics.jsonl").read_text().splitlines()]
        values["metrics"] = records
        speeds = [record["speed"] for record in records if "speed" in record]
        lines += ["", f"The last training step's meters: `{json.dumps(speeds[-1]) if speeds else 'none'}`"]
        return lines, values

    def _name(self) -> str:
        return "cuda:0" if self.on_gpu else "cpu"


def _grow(model: Path, device: torch.device) -> None:
    """Replace the tiny network and VAE by ones of the published size, random, made on the device."""
    import diffusers as library
    from transformers import T5Config, T5EncoderModel

    from exvideo_train.models.cogvideox.published import TRANSFORMER_5B

    diffusers: Any = library
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    with torch.device(device):
        fields = {name: value for name, value in TRANSFORMER_5B.items() if not name.startswith("_")}
        parts: dict[str, Any] = {
            "transformer": diffusers.CogVideoXTransformer3DModel(**fields),
            "vae": diffusers.AutoencoderKLCogVideoX(scaling_factor=0.7),
        }
        # One layer of the published width: what T5 takes is its own affair, not ours to measure.
        config = T5Config.from_pretrained(model / "text_encoder")
        config.d_model, config.num_layers = TRANSFORMER_5B["text_embed_dim"], 1
        parts["text_encoder"] = T5EncoderModel(config)
    torch.set_default_dtype(torch.float32)
    for name, part in parts.items():
        for file in (model / name).glob("*"):
            file.unlink()
        part.save_pretrained(model / name)
    del parts
    torch.cuda.empty_cache()


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _run(command: Sequence[str], seconds: float) -> None:
    """Raises UserError with the last lines of what a command said, when it fails or takes too long."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(1.0, seconds),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"no time left for {' '.join(map(str, command[:4]))}") from None
    if done.returncode:
        said = " / ".join((done.stdout + done.stderr).strip().splitlines()[-4:])
        raise UserError(f"{' '.join(map(str, command[:4]))} ended with {done.returncode}: {said}")


SECTIONS = {
    "versions": "Versions",
    "attention": "Attention kernels",
    "step": "A training step",
    "block": "One block",
    "commands": "The commands, on random weights",
    "sample": "Sampling",
}


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
        raise UserError(f"device={options['device']}: no GPU is here; device=cpu tries the road at small size")
    chosen = options["sections"].split(",") if options["sections"] else list(SECTIONS)
    if wrong := set(chosen) - SECTIONS.keys():
        raise UserError(f"sections={min(wrong)}: there are {', '.join(SECTIONS)}")
    about = machine(device, given, "benchmarks/gpu.py")
    end = time.monotonic() + 60 * float(options["minutes"])
    lines = [f"# {about['device']}", "", f"commit {about['commit']}; `{about['command']}`"]
    values: dict[str, Any] = {**about, "failed": {}}
    with tempfile.TemporaryDirectory(prefix="exvideo_gpu_") as folder:
        benchmark = Benchmark(device, Path(folder))
        for name in chosen:
            began = time.monotonic()
            lines += ["", f"## {SECTIONS[name]}", ""]
            try:
                found, values[name] = getattr(benchmark, name)(end - began)
            except (UserError, RuntimeError, OSError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                found, values["failed"][name] = [f"Not measured: {reason}"], str(error)
            lines += [*found, "", f"({time.monotonic() - began:.0f} s)"]
            print("\n".join(lines[-len(found) - 4 :]), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    output = Path(options["output"])
    atomic_write_json(output.with_suffix(".json"), values)
    atomic_write_text(output.with_suffix(".md"), "\n".join(lines) + "\n")
    print(f"\n{output.with_suffix('.md')}")
    if values["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
