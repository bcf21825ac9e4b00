"""From noise to latents: diffusers' CogVideoX samplers around our backbone, with constant guidance.

Axis letters: B batch, C channel, T latent frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor, nn
from tqdm import tqdm

from exvideo_train.errors import UserError
from exvideo_train.files import short
from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox.objective import read_scheduler_config

SCHEDULERS: dict[str, Any] = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}


@dataclass(frozen=True)
class SamplerSettings:
    """How videos are drawn.

    Args:
        scheduler: ``ddim``, or ``dpm`` (SDE-DPM-Solver++, which draws noise at every step).
        num_inference_steps: denoising steps.
        guidance_scale: constant classifier-free guidance; 1 or less turns it off and halves the work.
        seed: of the noise; every video starts anew from it.
        batched_guidance: predict with and without prompt in one call of the backbone, or one after the other, which
            takes less memory.

    Raises:
        UserError: a value that no sampler takes.
    """

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    batched_guidance: bool = True

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise UserError(f"scheduler={self.scheduler}: unknown; use one of {', '.join(SCHEDULERS)}")
        if self.num_inference_steps < 1:
            raise UserError(f"num_inference_steps={self.num_inference_steps}: must be positive; 50 to 100 are usual")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: must be between 0 and 2**63 - 1")


def load_scheduler(model_path: Path, settings: SamplerSettings) -> Any:
    """The sampler on the model's own schedule, with trailing timesteps (arXiv 2305.08891), its steps set.

    Raises:
        UserError: the model's file is missing or broken, or has fewer timesteps than steps are asked for.
    """
    path = model_path / "scheduler" / "scheduler_config.json"
    scheduler_class = SCHEDULERS[settings.scheduler]
    known = inspect.signature(scheduler_class.__init__).parameters
    config = {name: value for name, value in read_scheduler_config(model_path).items() if name in known}
    if (kind := config.get("prediction_type", "epsilon")) not in ("epsilon", "sample", "v_prediction"):
        raise UserError(f"{path}: prediction_type={short(kind)} is unknown; fetch the model again")
    try:
        scheduler = scheduler_class.from_config(config, timestep_spacing="trailing")
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no schedule ({error}); fetch the model again") from error
    if settings.num_inference_steps > scheduler.config.num_train_timesteps:
        raise UserError(
            f"num_inference_steps={settings.num_inference_steps}: the model has only "
            f"{scheduler.config.num_train_timesteps} timesteps"
        )
    scheduler.set_timesteps(settings.num_inference_steps)
    return scheduler


@torch.no_grad()
def denoise(
    backbone: nn.Module,
    model_path: Path,
    geometry: Geometry,
    text_1LC: Tensor,
    empty_text_1LC: Tensor,
    settings: SamplerSettings,
    label: str = "denoising",
) -> Tensor:
    """Draw the latents of one video.

    All noise comes from one CPU generator, in the order and dtype in which diffusers' CogVideoXPipeline draws it: the
    same seed gives the same video there, and on every device.

    Args:
        backbone: (latents_BTCHW, told_B, text_BLC) -> velocity_BTCHW, in ``text_1LC``'s dtype.
        text_1LC, empty_text_1LC: embeddings of the prompt and of the empty prompt, on the backbone's device.
        label: of the progress bar.

    Returns:
        latents_1TCHW, scaled as the backbone sees them, in ``text_1LC``'s dtype.
    """
    scheduler = load_scheduler(model_path, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    num_channels = cast(int, backbone.config.in_channels)  # type: ignore[union-attr]
    shape = (1, geometry.num_latent_frames, num_channels, geometry.latent_height, geometry.latent_width)
    dtype, device = text_1LC.dtype, text_1LC.device
    latents_1TCHW = torch.randn(shape, generator=generator, dtype=dtype).to(device) * scheduler.init_noise_sigma
    previous_timestep, previous_x0 = None, None
    for timestep in _progress(scheduler.timesteps.tolist(), label):
        velocity_1TCHW = _guided_velocity(backbone, latents_1TCHW, text_1LC, empty_text_1LC, timestep, settings)
        if settings.scheduler == "dpm":
            latents_1TCHW, previous_x0 = scheduler.step(
                velocity_1TCHW,
                previous_x0,
                timestep,
                previous_timestep,
                latents_1TCHW,
                generator=generator,
                return_dict=False,
            )
            previous_timestep = timestep
        else:
            latents_1TCHW = scheduler.step(velocity_1TCHW, timestep, latents_1TCHW, return_dict=False)[0]
        latents_1TCHW = latents_1TCHW.to(dtype)
    return latents_1TCHW


def _guided_velocity(
    backbone: nn.Module,
    latents_1TCHW: Tensor,
    text_1LC: Tensor,
    empty_text_1LC: Tensor,
    timestep: int,
    settings: SamplerSettings,
) -> Tensor:
    """``empty + scale * (prompt - empty)`` in float32."""
    timesteps_1 = torch.full((1,), timestep, device=latents_1TCHW.device, dtype=torch.int64)
    if settings.guidance_scale <= 1.0:
        return cast(Tensor, backbone(latents_1TCHW, timesteps_1, text_1LC)).float()
    if settings.batched_guidance:
        text_2LC = torch.cat([empty_text_1LC, text_1LC])
        both = backbone(latents_1TCHW.repeat(2, 1, 1, 1, 1), timesteps_1.repeat(2), text_2LC).float()
        empty, prompt = both.chunk(2)
    else:
        empty = backbone(latents_1TCHW, timesteps_1, empty_text_1LC).float()
        prompt = backbone(latents_1TCHW, timesteps_1, text_1LC).float()
    return cast(Tensor, empty + settings.guidance_scale * (prompt - empty))


def _progress(timesteps: list[int], label: str) -> Iterator[int]:
    # In a log file the bar's lines stack up: one every half minute is enough there.
    yield from tqdm(timesteps, desc=label, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30)
