"""``python -m exvideo_train.sample``: prompts to videos, with and without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exvideo_train.config.commands import Sample
from exvideo_train.entry import run_command
from exvideo_train.errors import UserError
from exvideo_train.files import refuse_inputs

if TYPE_CHECKING:
    import torch

    from exvideo_train.extensions.adapter_file import Adapter

USAGE = """\
Make videos from prompts, with an adapter, and from the same noise without it.

  python -m exvideo_train.sample +exp=129f adapter=A.safetensors prompt="..." output=DIR
  python -m exvideo_train.sample +exp=129f adapter=A.safetensors prompts_file=P.txt compare=true output=DIR
"""


def sample(config: Sample) -> None:
    """Check everything that can be checked, then sample."""
    geometry = config.geometry
    prompts = read_prompts(config)

    from exvideo_train.models.cogvideox.sampler import SamplerSettings

    settings = SamplerSettings(
        scheduler=config.scheduler.value,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        batched_guidance=config.batched_guidance,
    )
    device = choose_device(config.device)

    from exvideo_train.extensions.adapter_file import read_adapter
    from exvideo_train.models.hub import resolve_model_path
    from exvideo_train.sampling.output import SampleWriter, own_files, prepare_folder
    from exvideo_train.sampling.pipeline import Sampling, sample_videos

    adapter = read_adapter(Path(config.adapter)) if config.adapter else None
    if adapter is not None:
        print(describe(adapter, geometry.num_frames))
    sampling = Sampling(
        model_path=resolve_model_path(config.model.path, config.model.revision),
        geometry=geometry,
        sampler=settings,
        device=device,
        dtype=torch_dtype(config.model.dtype.value),
        adapter=adapter,
        adapter_source=config.adapter or "",
        adapter_scale=config.adapter_scale,
        compare=config.compare,
        vae_tiling=config.vae_tiling,
        attention=config.memory.attention,
    )
    output = Path(config.output)
    prepare_folder(output)
    inputs = {"adapter": config.adapter, "prompts_file": config.prompts_file}
    refuse_inputs("output", own_files(output), {name: [Path(path)] for name, path in inputs.items() if path})
    print(f"{len(prompts)} prompts x {len(sampling.variants)} videos of {geometry.name} on {device}", flush=True)
    writer = SampleWriter(output, sampling)
    for video in sample_videos(sampling, prompts):
        for path in writer.write(video):
            print(path, flush=True)


def read_prompts(config: Sample) -> list[str]:
    """``prompt``, or the lines of ``prompts_file`` that are not empty.

    Raises:
        UserError: both, neither, or a file without prompts.
    """
    if (config.prompt is None) == (config.prompts_file is None):
        given = "both are given" if config.prompt is not None else "neither is given"
        raise UserError(f'{given} of prompt and prompts_file; give prompt="..." or prompts_file=FILE')
    if config.prompt is not None:
        return [config.prompt]
    path = Path(str(config.prompts_file))
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"prompts_file={path}: {error.strerror}; name a text file with a prompt a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompts_file={path}: not UTF-8 text ({error}); save it as UTF-8") from error
    if not prompts:
        raise UserError(f"prompts_file={path}: holds no prompt; write one a line")
    return prompts


def choose_device(name: str) -> torch.device:
    """``auto``: the first GPU if there is one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).split("\n")[0]
        raise UserError(f"device={name}: cannot be used here ({reason}); use auto, cpu or cuda:0") from error
    return device


def torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def describe(adapter: Adapter, num_frames: int) -> str:
    """One line on an adapter, with a word of warning when it was trained at another length."""
    about = adapter.provenance
    line = f"adapter: rank {adapter.rank}, alpha {adapter.alpha:g}, {len(adapter.tensors) // 2} Linears"
    if about:
        line += f"; {about.get('num_frames')} frames, {about.get('steps')} steps on {about.get('base_model')}"
        if about.get("num_frames") not in (None, num_frames):
            line += f"\nnote: trained at {about['num_frames']} frames, sampled at num_frames={num_frames}"
    return line


def main() -> None:
    run_command(Sample, sample, "sample", USAGE)


if __name__ == "__main__":
    main()
