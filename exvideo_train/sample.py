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

    from exvideo_train.extensions.extension import Trained
    from exvideo_train.geometry import Geometry

USAGE = """\
Make videos from prompts, with an adapter, and from the same noise without it.

  python -m exvideo_train.sample +exp=129f adapter=A.safetensors prompt="..." output=DIR
  python -m exvideo_train.sample +exp=129f adapter=A.safetensors prompts_file=P.txt compare=true output=DIR
"""


def sample(config: Sample) -> None:
    """Check everything that can be checked, then sample."""
    geometry = config.geometry
    prompts = read_prompts(config)

    from exvideo_train.models.registry import backbone_family, check_geometries, known_family, likely_family
    from exvideo_train.models.stages import SamplerSettings

    check_geometries([geometry], config.model.path)
    settings = SamplerSettings(
        scheduler=config.scheduler.value,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        batched_guidance=config.batched_guidance,
    )
    device = choose_device(config.device)

    from exvideo_train.models.hub import resolve_model_path
    from exvideo_train.sampling.output import SampleWriter, own_files, prepare_folder
    from exvideo_train.sampling.pipeline import Sampling, sample_videos

    known, likely = known_family(config.model.path), likely_family(config.model.path)
    # Before a download: a mistake in its name must not cost an hour.
    adapter = likely.extension().read(Path(config.adapter), known and known.name) if config.adapter else None
    if adapter is not None:
        print(describe(adapter, geometry.num_frames))
    parts = tuple(dict.fromkeys((*likely.training_parts, *likely.encoder_parts)))
    model_path = resolve_model_path(config.model.path, config.model.revision, parts)
    family = backbone_family(model_path)
    family.grid.check(geometry)
    sampling = Sampling(
        model_path=model_path,
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
        image_HWC=read_image(Path(config.image), geometry) if config.image else None,
    )
    output = Path(config.output)
    prepare_folder(output)
    inputs = {"adapter": config.adapter, "prompts_file": config.prompts_file, "image": config.image}
    refuse_inputs("output", own_files(output), {name: [Path(path)] for name, path in inputs.items() if path})
    print(f"{len(prompts)} prompts x {len(sampling.variants)} videos of {geometry.name} on {device}", flush=True)
    writer = SampleWriter(output, sampling)
    for video in sample_videos(sampling, prompts):
        for path in writer.write(video):
            print(path, flush=True)


def read_prompts(config: Sample) -> list[str]:
    """``prompt``, or the lines of ``prompts_file`` that are not empty; with an image, none need be given.

    Raises:
        UserError: both, neither, or a file without prompts.
    """
    if config.image is not None and config.prompt is None and config.prompts_file is None:
        return [""]
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


def read_image(path: Path, geometry: Geometry) -> torch.Tensor:
    """A picture cut at its centre and resized to the frames' size, uint8 RGB (H, W, C).

    Raises:
        UserError: it cannot be read, or is no picture.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=("PNG", "JPEG")) as opened:
            picture = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (geometry.width, geometry.height))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image={path}: cannot be read as a picture ({error}); name a PNG or JPEG file") from error
    return torch.from_numpy(np.asarray(picture).copy())


def describe(adapter: Trained, num_frames: int) -> str:
    """One line on an adapter, with a word of warning when it was trained at another length."""
    line = f"adapter: {adapter.describe()}"
    if (trained_at := adapter.provenance.get("num_frames", num_frames)) != num_frames:
        line += f"\nnote: trained at {trained_at} frames, sampled at num_frames={num_frames}"
    return line


def main() -> None:
    run_command(Sample, sample, "sample", USAGE)


if __name__ == "__main__":
    main()
