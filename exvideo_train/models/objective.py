"""The training objective: v-prediction MSE in float32, and the random draws that it needs.

Axis letters: B batch, C channel, T latent frames, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from exvideo_train.models.cogvideox.schedule import NoiseSchedule


def add_noise(schedule: NoiseSchedule, latents_BTCHW: Tensor, noise_BTCHW: Tensor, timesteps_B: Tensor) -> Tensor:
    """``sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise``, (B, T, C, H, W) float32."""
    signal_B1111 = _over_sample(schedule.signal_scale(timesteps_B))
    noise_B1111 = _over_sample(schedule.noise_scale(timesteps_B))
    return signal_B1111 * latents_BTCHW.float() + noise_B1111 * noise_BTCHW.float()


def velocity_target(schedule: NoiseSchedule, latents_BTCHW: Tensor, noise_BTCHW: Tensor, timesteps_B: Tensor) -> Tensor:
    """``sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0``, (B, T, C, H, W) float32 (arXiv 2202.00512)."""
    signal_B1111 = _over_sample(schedule.signal_scale(timesteps_B))
    noise_B1111 = _over_sample(schedule.noise_scale(timesteps_B))
    return signal_B1111 * noise_BTCHW.float() - noise_B1111 * latents_BTCHW.float()


def _over_sample(scale_B: Tensor) -> Tensor:
    return scale_B.view(-1, 1, 1, 1, 1)


class Loss(NamedTuple):
    """One loss at three resolutions, all float32; the coarser are means of the finer.

    Attributes:
        mean: scalar, what is minimised.
        per_sample_B: (B,).
        per_position_BT: (B, T), by latent frame: shows how the loss changes along the video.
    """

    mean: Tensor
    per_sample_B: Tensor
    per_position_BT: Tensor


def v_prediction_loss(prediction_BTCHW: Tensor, target_BTCHW: Tensor) -> Loss:
    """Mean squared error of the velocity in float32.

    It equals the squared error of x_0 weighted with 1 / (1 - alpha_bar), the form in which CogVideoX's own
    training code writes it, without that form's division by numbers near zero.
    """
    squared_BTCHW = (prediction_BTCHW.float() - target_BTCHW.float()).square()
    per_position_BT = squared_BTCHW.mean(dim=(2, 3, 4))
    per_sample_B = per_position_BT.mean(dim=1)
    return Loss(per_sample_B.mean(), per_sample_B, per_position_BT)


class TrainingDraw(NamedTuple):
    """Everything random about one training sample, on the CPU.

    Attributes:
        posterior_noise_TCHW: float32, picks a latent from the VAE's posterior.
        noise_TCHW: float32, the diffusion noise.
        timestep: 0 <= timestep < num_train_timesteps, uniform.
        drop_caption: train this sample with the empty prompt, so that guidance has an unconditional side.
    """

    posterior_noise_TCHW: Tensor
    noise_TCHW: Tensor
    timestep: int
    drop_caption: bool


def draw(
    seed: int, position: int, shape_TCHW: Sequence[int], num_train_timesteps: int, caption_dropout: float
) -> TrainingDraw:
    """Draw for the sample at one global position of the run.

    The result is a function of the arguments alone: not of the rank, the number of ranks, the accumulation, nor
    of what was drawn before, so a resumed or differently split run sees the same noise.

    Args:
        seed: of the run.
        position: of the sample in the whole run's order, epochs included.
        shape_TCHW: of the latent.
        num_train_timesteps: of the schedule.
        caption_dropout: probability of ``drop_caption``.
    """
    shape = tuple(shape_TCHW)
    return TrainingDraw(
        posterior_noise_TCHW=torch.randn(shape, generator=generator_for(seed, "posterior", position)),
        noise_TCHW=torch.randn(shape, generator=generator_for(seed, "noise", position)),
        timestep=int(torch.randint(num_train_timesteps, (), generator=generator_for(seed, "timestep", position))),
        drop_caption=bool(torch.rand((), generator=generator_for(seed, "caption", position)) < caption_dropout),
    )


def generator_for(seed: int, purpose: str, position: int) -> torch.Generator:
    """A CPU generator of its own for each seed, purpose and position.

    Python's ``hash`` differs between processes, and no generator promises that neighbouring seeds give
    independent streams, so the three are mixed by a stable hash.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
