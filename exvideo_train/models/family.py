"""What the rest of the project may know of a kind of backbone, without knowing which one it is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from exvideo_train.geometry import Geometry
from exvideo_train.models.noise_levels import NoiseLevels

Config = TypeVar("Config")


@dataclass(frozen=True)
class BackboneFamily(Generic[Config]):
    """A kind of backbone: how it is found, built and loaded, and what it costs.

    Another family is another value of this class in the registry; nothing that uses one changes.
    """

    name: str
    class_name: str
    """``_class_name`` in the published config of the network."""
    subfolder: str
    """Folder of the network inside a published model."""
    model_class: type[nn.Module]
    """Its instances have ``config``, ``blocks`` (an ``nn.ModuleList``), ``run_block`` and a forward
    ``(latents_BTCHW, told_B, **conditions) -> prediction_BTCHW``."""
    block_class: type[nn.Module]
    build: Callable[[Config], nn.Module]
    """The network with fresh parameters, on the device that is current (the meta device for a plan)."""
    read_config: Callable[[Path], Config]
    """From the subfolder's ``config.json``."""
    load: Callable[[Path, torch.dtype, torch.device | str], nn.Module]
    """From the subfolder, in a dtype, onto a device."""
    published_config: Callable[[str], Config | None]
    """Of a hub id whose config is known without a download, else None."""
    default_lora_targets: tuple[str, ...]
    """Names of the Linears inside a block."""
    noise_levels: Callable[[Path], NoiseLevels]
    """Of a published model folder."""
    text_length: Callable[[Config], int]
    """Tokens that every prompt is padded to."""
    sample_channels: Callable[[Config], tuple[int, int]]
    """Channels of a video's latents and of a prompt's embedding."""
    num_base_frames: Callable[[Config], int]
    """Video frames that the base model was trained on."""
    num_tokens: Callable[[Config, Geometry], int]
    """Length of the sequence that one sample becomes."""
    num_parameters: Callable[[Config], int]
    num_lora_parameters: Callable[[Config, int, Collection[str]], int]
    """With a rank, on the named Linears of every block."""
    attention_flops: Callable[[Config, Geometry], int]
    """Of one block's attention, one sample, one forward."""
    block_forward_flops: Callable[[Config, Geometry], int]
    forward_flops: Callable[[Config, Geometry], int]
    """Of the frozen network, one sample, one forward, exactly as torch's FlopCounterMode counts."""
    lora_forward_flops: Callable[[Config, Geometry, int, Collection[str]], int]
    """What a LoRA of this rank on the named Linears of every block adds."""
