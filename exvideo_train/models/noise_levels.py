"""What every diffusion objective here has in common: a table of noise levels, linear in signal and noise.

    input  = signal * x0 + noise * eps
    target = target_signal * x0 + target_noise * eps

v-prediction, continuous sigmas and flow matching are different tables; a row of the table stands for a level wherever
samples are drawn, resumed or validated.

Axis letters: B batch, T latent frames, C channel, H height, W width, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The levels that a model is trained at, a row each.

    Args:
        signal_L, noise_L: shares of clean latent and noise in the network's input, float64.
        target_signal_L, target_noise_L: shares of them in what the network is to predict, float64.
        told_L: what the network is told of the level, float64: the timestep, or a function of sigma.
        weight_L: of the squared error in the loss, float64; None leaves it as it is.
    """

    signal_L: Tensor
    noise_L: Tensor
    target_signal_L: Tensor
    target_noise_L: Tensor
    told_L: Tensor
    weight_L: Tensor | None = None

    def __post_init__(self) -> None:
        columns = [column for field in fields(self) if (column := getattr(self, field.name)) is not None]
        assert all(column.dtype == torch.float64 and column.shape == self.signal_L.shape for column in columns)

    @classmethod
    def v_prediction(cls, alphas_cumprod_L: Tensor) -> NoiseLevels:
        """Levels of a discrete schedule whose network predicts the velocity (arXiv 2202.00512), unweighted.

        The plain error of the velocity equals that of x0 weighted with 1 / (1 - alpha_bar), the form in which
        CogVideoX's own training code writes it, without that form's division by numbers near zero.

        Args:
            alphas_cumprod_L: float64, the share of signal in the variance at each timestep.
        """
        # In bfloat16 the noise's share would be 0 at the first timesteps and wrong by more than 1 % up to timestep 83.
        signal_L, noise_L = alphas_cumprod_L.sqrt(), (1.0 - alphas_cumprod_L).sqrt()
        told_L = torch.arange(len(signal_L), dtype=torch.float64, device=signal_L.device)
        return cls(signal_L, noise_L, -noise_L, signal_L, told_L)

    def __len__(self) -> int:
        return len(self.signal_L)

    def to(self, device: torch.device | str) -> NoiseLevels:
        """The same table on ``device``, so that a step copies nothing from the host."""
        columns: Any = (getattr(self, field.name) for field in fields(self))
        moved: Any = (column if column is None else column.to(device) for column in columns)
        return NoiseLevels(*moved)

    def mix(self, latents_BTCHW: Tensor, noise_BTCHW: Tensor, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input and its target, (B, T, C, H, W) float32.

        Args:
            rows_B: each sample's level, on the table's device.
        """
        latents_BTCHW, noise_BTCHW = latents_BTCHW.float(), noise_BTCHW.float()
        input_BTCHW = self._at(self.signal_L, rows_B) * latents_BTCHW + self._at(self.noise_L, rows_B) * noise_BTCHW
        target_BTCHW = (
            self._at(self.target_signal_L, rows_B) * latents_BTCHW + self._at(self.target_noise_L, rows_B) * noise_BTCHW
        )
        return input_BTCHW, target_BTCHW

    def told_at(self, rows_B: Tensor) -> Tensor:
        """What the network is told, (B,) float32."""
        return self.told_L[rows_B].float()

    def weight_at(self, rows_B: Tensor) -> Tensor | None:
        """(B,) float32; None where the loss is unweighted."""
        return None if self.weight_L is None else self.weight_L[rows_B].float()

    @staticmethod
    def _at(column_L: Tensor, rows_B: Tensor) -> Tensor:
        return column_L[rows_B].float().view(-1, 1, 1, 1, 1)


class Loss(NamedTuple):
    """One loss at three resolutions, all float32.

    Attributes:
        mean: scalar, what is minimised: the mean of ``per_sample_B``.
        per_sample_B: (B,), weighted.
        per_position_BT: (B, T), by latent frame and unweighted, so that it can be compared between models: shows how
            the loss changes along the video.
    """

    mean: Tensor
    per_sample_B: Tensor
    per_position_BT: Tensor


def squared_error(prediction_BTCHW: Tensor, target_BTCHW: Tensor, weight_B: Tensor | None = None) -> Loss:
    """Mean squared error in float32, weighted by sample."""
    squared_BTCHW = (prediction_BTCHW.float() - target_BTCHW.float()).square()
    per_position_BT = squared_BTCHW.mean(dim=(2, 3, 4))
    per_sample_B = per_position_BT.mean(dim=1)
    if weight_B is not None:
        per_sample_B = weight_B * per_sample_B
    return Loss(per_sample_B.mean(), per_sample_B, per_position_BT)


def denoising_loss(
    network: Callable[..., Tensor],
    levels: NoiseLevels,
    latents_BTCHW: Tensor,
    noise_BTCHW: Tensor,
    rows_B: Tensor,
    conditions: Mapping[str, Tensor],
) -> Loss:
    """The loss of a batch at given levels: the one that training minimises and validation reports."""
    input_BTCHW, target_BTCHW = levels.mix(latents_BTCHW, noise_BTCHW, rows_B)
    prediction_BTCHW = network(input_BTCHW, levels.told_at(rows_B), **conditions)
    return squared_error(prediction_BTCHW, target_BTCHW, levels.weight_at(rows_B))
