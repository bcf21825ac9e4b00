"""From what a VAE gives to what a network is trained on, and back.

Axis letters: C channel, T latent frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exvideo_train.files import short
from exvideo_train.models.config_file import SCALING_FACTOR_BOUNDS

# diffusers' DiagonalGaussianDistribution clamps the VAE's unbounded log-variance to this range.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
SMALLEST, LARGEST = SCALING_FACTOR_BOUNDS
MOST_CHANNELS = 1 << 16


@dataclass(frozen=True)
class Normalisation:
    """``(latent - shift) * factor``, by channel.

    Args:
        factor_C: one factor, or one a channel.
        shift_C: likewise.
        sample: a latent is drawn from the posterior that the VAE gives, mean and log-variance; else it gives the
            latent itself.

    Raises:
        ValueError: a factor that would make all latents zero, infinite or of the other sign, or no number.
    """

    factor_C: tuple[float, ...]
    shift_C: tuple[float, ...] = (0.0,)
    sample: bool = True

    def __post_init__(self) -> None:
        for number in self.factor_C:
            check_factor("scaling_factor", number)
        for number in self.shift_C:
            if not _is_number(number) or abs(number) > LARGEST:
                raise ValueError(f"shift={short(number)}: must be a number from {-LARGEST:g} to {LARGEST:g}")

    def latent_channels(self, stored_channels: int) -> int:
        """Of the latent, by those of what the VAE gives."""
        return stored_channels // 2 if self.sample else stored_channels

    def latents(self, stored_CTHW: Tensor, noise_TCHW: Tensor) -> Tensor:
        """The network's latent (T, C, H, W), float32.

        Args:
            stored_CTHW: what the VAE gave: (2C, T, H, W), mean then log-variance, or (C, T, H, W).
            noise_TCHW: float32, picks a latent from the posterior.
        """
        if not self.sample:
            return self.of_mean(stored_CTHW).transpose(0, 1).contiguous()
        mean_CTHW, _ = stored_CTHW.float().chunk(2, dim=0)
        latents_CTHW = mean_CTHW + self._deviation(stored_CTHW) * noise_TCHW.transpose(0, 1)
        return self.of_mean(latents_CTHW).transpose(0, 1).contiguous()

    def mean(self, stored_CTHW: Tensor) -> Tensor:
        """The likeliest latent, (C, T, H, W) float32."""
        mean_CTHW = stored_CTHW.float()
        return self.of_mean(mean_CTHW.chunk(2, dim=0)[0] if self.sample else mean_CTHW)

    def deviation(self, stored_CTHW: Tensor) -> Tensor:
        """Standard deviation of what :meth:`latents` draws, (C, T, H, W) float32; zero where it draws nothing."""
        if not self.sample:
            return torch.zeros_like(stored_CTHW, dtype=torch.float32)
        return self._deviation(stored_CTHW) * self._column(self.factor_C, stored_CTHW)

    @staticmethod
    def _deviation(stored_CTHW: Tensor) -> Tensor:
        _, log_variance_CTHW = stored_CTHW.float().chunk(2, dim=0)
        return torch.exp(0.5 * log_variance_CTHW.clamp(*LOG_VARIANCE_RANGE))

    def of_mean(self, latents_CTHW: Tensor) -> Tensor:
        """A latent of the VAE as the network sees it."""
        return (latents_CTHW - self._column(self.shift_C, latents_CTHW)) * self._column(self.factor_C, latents_CTHW)

    def undo(self, latents_CTHW: Tensor) -> Tensor:
        """A network's latent as the VAE decodes it."""
        return latents_CTHW / self._column(self.factor_C, latents_CTHW) + self._column(self.shift_C, latents_CTHW)

    @staticmethod
    def _column(numbers: tuple[float, ...], like_CTHW: Tensor) -> Any:
        if len(numbers) == 1:
            return numbers[0]
        return torch.tensor(numbers, dtype=like_CTHW.dtype, device=like_CTHW.device).view(-1, 1, 1, 1)

    def describe(self) -> str:
        """For people."""
        if len(self.factor_C) == 1 and not any(self.shift_C):
            return f"scaling factor {self.factor_C[0]:g}"
        return f"{len(self.factor_C)} scaling factors and {len(self.shift_C)} shifts"

    def to_json(self) -> dict[str, Any]:
        """Fields of a store's description: the one factor of most models, or all there is."""
        if self == Normalisation(self.factor_C[:1]):
            return {"scaling_factor": self.factor_C[0]}
        return {"normalisation": {"factor": self.factor_C, "shift": self.shift_C, "sample": self.sample}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Normalisation:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: fields are missing or hold something else.
        """
        if "normalisation" not in content:
            if "scaling_factor" not in content:
                raise ValueError("scaling_factor is missing")
            return cls((check_factor("scaling_factor", content["scaling_factor"]),))
        fields = content["normalisation"]
        if not isinstance(fields, dict) or set(fields) != {"factor", "shift", "sample"}:
            raise ValueError(f"normalisation={short(fields)}: must have factor, shift and sample")
        for name in ("factor", "shift"):
            if not isinstance(fields[name], list) or not 1 <= len(fields[name]) <= MOST_CHANNELS:
                raise ValueError(f"normalisation: {name}={short(fields[name])}: must be a list of numbers")
        if not isinstance(fields["sample"], bool):
            raise ValueError(f"normalisation: sample={short(fields['sample'])}: must be true or false")
        return cls(tuple(fields["factor"]), tuple(fields["shift"]), fields["sample"])


def check_factor(name: str, value: Any) -> float:
    """A factor between a VAE's latents and the network's.

    Raises:
        ValueError: it would make all latents zero, infinite, of the other sign or not a number.
    """
    if not _is_number(value) or not SMALLEST <= value <= LARGEST:
        raise ValueError(f"{name}={short(value)}: must be a number from {SMALLEST:g} to {LARGEST:g}")
    return float(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
