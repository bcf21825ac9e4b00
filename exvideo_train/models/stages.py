"""What a family gives to the stages that training does not need: encoding clips, and drawing videos.

Axis letters: C channel, T latent frames, F video frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry


class TextEncoder(Protocol):
    """Built as ``(model_path, device, dtype, max_length)``; raises UserError when it cannot be loaded."""

    def tensors(self, caption: str) -> dict[str, Tensor]:
        """What is stored of a caption; of ``""`` it stands for no prompt."""

    def num_tokens_cut(self, caption: str) -> int:
        """Tokens at the caption's end that are left out."""

    def close(self) -> None:
        """Free the weights."""


class VideoEncoder(Protocol):
    """Built as ``(model_path, device, dtype, tiling)``; raises UserError when it cannot be loaded."""

    def tensors(self, frames_FHWC: Tensor, fps: float) -> dict[str, Tensor]:
        """What is stored of a clip's frames, uint8 RGB at ``fps`` frames a second."""

    def image_tensors(self, image_HWC: Tensor, geometry: Geometry) -> dict[str, Tensor]:
        """What a video is made from that begins with an image, named as :meth:`tensors` names it.

        Called where the family takes an image; uint8 RGB of the geometry's size.
        """

    def decode(self, latents_TCHW: Tensor) -> tuple[Tensor, float]:
        """uint8 RGB frames (F, H, W, C) on the CPU, and the share of their numbers that were finite."""

    def close(self) -> None:
        """Free the weights."""


@dataclass(frozen=True)
class SamplerSettings:
    """How videos are drawn.

    Args:
        scheduler: one of the family's samplers.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 or less turns it off and halves the work.
        seed: of the noise; every video starts anew from it.
        batched_guidance: predict with and without condition in one call of the network, or one after the other, which
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
        if self.num_inference_steps < 1:
            raise UserError(f"num_inference_steps={self.num_inference_steps}: must be positive; 50 to 100 are usual")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: must be between 0 and 2**63 - 1")


class Draw(Protocol):
    """From noise to the latents of one video."""

    def __call__(
        self,
        network: nn.Module,
        model_path: Path,
        geometry: Geometry,
        conditions: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor],
        settings: SamplerSettings,
        label: str,
    ) -> Tensor:
        """Latents (1, T, C, H, W), scaled as the network sees them.

        Args:
            conditions, unconditional: of the prompt and of no prompt, with a batch axis of 1, on the network's device.
            label: of the progress bar.
        """
