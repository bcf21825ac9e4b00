"""Everything random about a training sample, as a function of seed and position.

Axis letters: C channel, T latent frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from exvideo_train.randomness import generator_for


class TrainingDraw(NamedTuple):
    """Everything random about one training sample, on the CPU.

    Attributes:
        posterior_noise_TCHW: float32, picks a latent from the VAE's posterior.
        noise_TCHW: float32, the diffusion noise.
        row: 0 <= row < num_levels, uniform: the noise level.
        drop_condition: train this sample with the empty condition, so that guidance has an unconditional side.
    """

    posterior_noise_TCHW: Tensor
    noise_TCHW: Tensor
    row: int
    drop_condition: bool


def draw(seed: int, position: int, shape_TCHW: Sequence[int], num_levels: int, dropout: float) -> TrainingDraw:
    """Draw for the sample at one global position of the run.

    The result is a function of the arguments alone: not of the rank, the number of ranks, the accumulation, nor
    of what was drawn before, so a resumed or differently split run sees the same noise.

    Args:
        seed: of the run.
        position: of the sample in the whole run's order, epochs included.
        shape_TCHW: of the latent.
        num_levels: rows of the model's noise levels.
        dropout: probability of ``drop_condition``.
    """
    shape = tuple(shape_TCHW)
    return TrainingDraw(
        posterior_noise_TCHW=torch.randn(shape, generator=generator_for(seed, "posterior", position)),
        noise_TCHW=torch.randn(shape, generator=generator_for(seed, "noise", position)),
        row=int(torch.randint(num_levels, (), generator=generator_for(seed, "timestep", position))),
        drop_condition=bool(torch.rand((), generator=generator_for(seed, "caption", position)) < dropout),
    )
