"""From noise to latents: diffusers' CogVideoX samplers around our backbone, with constant guidance.

Axis letters: B batch, C channel, T latent frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor, nn

from exvideo_train.errors import UserError
from exvideo_train.files import short
from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox.family import GRID
from exvideo_train.models.cogvideox.objective import read_scheduler_config
from exvideo_train.models.stages import SamplerSettings

SCHEDULERS: dict[str, Any] = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}


def load_scheduler(model_path: Path, settings: SamplerSettings) -> Any:
    """The sampler on the model's own schedule, with trailing (arXiv 2305.08891) or even timesteps, its steps set.

    Raises:
        UserError: an unknown sampler; the model's file is missing or broken, or has fewer timesteps than steps asked
            for.
    """
    if settings.scheduler not in SCHEDULERS:
        raise UserError(f"scheduler={settings.scheduler}: unknown; use one of {', '.join(SCHEDULERS)}")
    path = model_path / "scheduler" / "scheduler_config.json"
    scheduler_class = SCHEDULERS[settings.scheduler]
    known = inspect.signature(scheduler_class.__init__).parameters
    config = {name: value for name, value in read_scheduler_config(model_path).items() if name in known}
    if (kind := config.get("prediction_type", "epsilon")) not in ("epsilon", "sample", "v_prediction"):
        raise UserError(f"{path}: prediction_type={short(kind)} is unknown; fetch the model again")
    try:
        scheduler = scheduler_class.from_config(config, timestep_spacing=settings.timestep_spacing)
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
def draw(
    network: nn.Module,
    model_path: Path,
    geometry: Geometry,
    conditions: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor],
    settings: SamplerSettings,
    seed: int,
    on_step: Callable[[], None],
) -> Tensor:
    """Draw the latents of one video: a :class:`~exvideo_train.models.stages.Draw`.

    All noise comes from one CPU generator, in the order and dtype in which diffusers' CogVideoXPipeline draws it: the
    same seed gives the same video there, and on every device. Latents are in the dtype of ``text_BLC``.
    """
    scheduler = load_scheduler(model_path, settings)
    generator = torch.Generator().manual_seed(seed)
    frames, rows, columns = GRID.shape_THW(geometry)
    shape = (1, frames, cast(int, network.config.in_channels), rows, columns)  # type: ignore[union-attr]
    dtype, device = conditions["text_BLC"].dtype, conditions["text_BLC"].device
    latents_1TCHW = torch.randn(shape, generator=generator, dtype=dtype).to(device) * scheduler.init_noise_sigma
    previous_timestep, previous_x0 = None, None
    for timestep in scheduler.timesteps.tolist():
        velocity_1TCHW = _guided_velocity(network, latents_1TCHW, conditions, unconditional, timestep, settings)
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
        on_step()
    return latents_1TCHW


def _guided_velocity(
    network: nn.Module,
    latents_1TCHW: Tensor,
    conditions: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor],
    timestep: int,
    settings: SamplerSettings,
) -> Tensor:
    """``empty + scale * (prompt - empty)`` in float32."""
    timesteps_1 = torch.full((1,), timestep, device=latents_1TCHW.device, dtype=torch.int64)
    if settings.guidance_scale <= 1.0:
        return cast(Tensor, network(latents_1TCHW, timesteps_1, **conditions)).float()
    if settings.batched_guidance:
        both = {name: torch.cat([unconditional[name], value]) for name, value in conditions.items()}
        empty, prompt = network(latents_1TCHW.repeat(2, 1, 1, 1, 1), timesteps_1.repeat(2), **both).float().chunk(2)
    else:
        empty = network(latents_1TCHW, timesteps_1, **unconditional).float()
        prompt = network(latents_1TCHW, timesteps_1, **conditions).float()
    return cast(Tensor, empty + settings.guidance_scale * (prompt - empty))
