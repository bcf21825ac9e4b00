"""LoRA updates as after training."""

from __future__ import annotations

import torch
from torch import nn

from exvideo_train.extensions.lora import lora_parameters


def randomise_b(model: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """B, with which an update begins at zero, becomes something that changes the output visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
