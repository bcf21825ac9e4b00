"""What a family gives to the stages that training does not need: encoding clips, and drawing videos.

Axis letters: C channel, T latent frames, F video frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry


class TextEncoder(Protocol):
    """Built as ``(model_path, device, dtype, max_length)``; raises UserError when it cannot be loaded."""

    def tensors(self, caption: str) -> dict[str, Tensor]:
        """What is stored of a caption; of ``""`` it stands for no prompt."""

    def num_tokens_cut(self, caption: str) -> int:
        """Tokens at the caption's end that are left out."""

    def num_tokens_unknown(self, caption: str) -> int:
        """Tokens that stand for text which the encoder has no token for, such as another alphabet."""

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

    def decode(self, latents_TCHW: Tensor) -> Iterator[tuple[Tensor, float]]:
        """The video in order, some frames at a time, so that memory does not grow with its length.

        Yields:
            uint8 RGB frames (F, H, W, C) on the CPU, and the share of their numbers that were finite.

        Raises:
            UserError: the device's memory is too small.
        """

    def close(self) -> None:
        """Free the weights."""


def torch_dtype(name: str) -> torch.dtype:
    """Of ``bf16``, ``fp16`` or ``fp32``."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def decode_whole(encoder: VideoEncoder, latents_TCHW: Tensor) -> Tensor:
    """All frames of a short video, uint8 RGB (F, H, W, C) on the CPU."""
    return torch.cat([frames_FHWC for frames_FHWC, _ in encoder.decode(latents_TCHW)])


def is_out_of_memory(error: RuntimeError) -> bool:
    """Torch's own error, or what cuDNN says when its workspace does not fit."""
    cudnn = ("CUDNN_STATUS_ALLOC_FAILED", "unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in cudnn)


@dataclass(frozen=True)
class SamplerSettings:
    """How videos are drawn.

    Args:
        scheduler: one of the family's samplers.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 or less turns it off and halves the work.
        timestep_spacing: which of the training timesteps the steps are: ``trailing`` or ``linspace``, diffusers' names.
        batched_guidance: predict with and without condition in one call of the network, or one after the other, which
            takes less memory.

    Raises:
        UserError: a value that no sampler takes.
    """

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    timestep_spacing: str = "trailing"
    batched_guidance: bool = True

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise UserError(f"num_inference_steps={self.num_inference_steps}: must be positive; 50 to 100 are usual")


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
        seed: int,
        on_step: Callable[[], None],
    ) -> Tensor:
        """Latents (1, T, C, H, W), scaled as the network sees them.

        Args:
            conditions, unconditional: of the prompt and of no prompt, with a batch axis of 1, on the network's device.
            seed: of all noise of this video, 0 to 2**63 - 1.
            on_step: called after each denoising step.

        Raises:
            UserError: settings that this model has no meaning for.
        """
