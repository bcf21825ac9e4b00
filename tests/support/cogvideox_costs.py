"""What the DiT costs at a geometry: tokens, parameters and FLOPs, from its config alone.

FLOPs are two for each multiply-add of every matrix product, convolution and attention, as
`torch.utils.flop_counter.FlopCounterMode` counts them; element-wise work is left out. A test holds them equal.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

import torch

from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox.family import GRID
from exvideo_train.models.cogvideox.network import FEED_FORWARD_EXPANSION, CogVideoXConfig, CogVideoXDiT

NUM_MODULATIONS = 6


@dataclass(frozen=True)
class LinearSize:
    """A Linear of a block: its sizes, and whether it runs on each token or once a sample."""

    in_features: int
    out_features: int
    per_token: bool


def block_linears(config: CogVideoXConfig) -> dict[str, LinearSize]:
    """The eight Linears of one block, by their name inside it: all that LoRA adapts by default."""
    dim, hidden_dim = config.inner_dim, FEED_FORWARD_EXPANSION * config.inner_dim
    modulation = LinearSize(config.time_embed_dim, NUM_MODULATIONS * dim, per_token=False)
    projection = LinearSize(dim, dim, per_token=True)
    return {
        "norm1.linear": modulation,
        "attn1.to_q": projection,
        "attn1.to_k": projection,
        "attn1.to_v": projection,
        "attn1.to_out.0": projection,
        "norm2.linear": modulation,
        "ff.net.0.proj": LinearSize(dim, hidden_dim, per_token=True),
        "ff.net.2": LinearSize(hidden_dim, dim, per_token=True),
    }


def num_video_tokens(config: CogVideoXConfig, geometry: Geometry) -> int:
    """Patches of one sample's latents."""
    return GRID.num_tokens(geometry)


def num_tokens(config: CogVideoXConfig, geometry: Geometry) -> int:
    """Length of one sample's joint sequence: text, padded, and video."""
    return config.max_text_seq_length + num_video_tokens(config, geometry)


@functools.lru_cache(maxsize=8)
def num_parameters(config: CogVideoXConfig) -> int:
    """Parameters of the whole network, counted on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CogVideoXDiT(config).parameters())


def num_lora_parameters(config: CogVideoXConfig, rank: int, targets: Collection[str]) -> int:
    """Parameters of a LoRA of this rank on the named Linears of every block."""
    linears = block_linears(config)
    return config.num_layers * sum(rank * (linears[name].in_features + linears[name].out_features) for name in targets)


def attention_flops(config: CogVideoXConfig, geometry: Geometry) -> int:
    """Of one block's attention in one forward of one sample: both products, without the projections."""
    return 4 * num_tokens(config, geometry) ** 2 * config.inner_dim


def block_forward_flops(config: CogVideoXConfig, geometry: Geometry) -> int:
    """Of one block in one forward of one sample."""
    tokens = num_tokens(config, geometry)
    linears = sum(
        2 * linear.in_features * linear.out_features * (tokens if linear.per_token else 1)
        for linear in block_linears(config).values()
    )
    return linears + attention_flops(config, geometry)


def forward_flops(config: CogVideoXConfig, geometry: Geometry) -> int:
    """Of one forward of one sample through the whole frozen network, LoRA not included."""
    dim, time_dim = config.inner_dim, config.time_embed_dim
    tokens = num_tokens(config, geometry)
    patch_area = config.patch_size**2
    embed = (
        2 * num_video_tokens(config, geometry) * config.in_channels * patch_area * dim
        + 2 * config.max_text_seq_length * config.text_embed_dim * dim
        + 2 * time_dim * (dim + time_dim)
    )
    # The last projection runs on text tokens too: joining ranks after it moves 64 channels a token, not 3072.
    output = 2 * time_dim * 2 * dim + 2 * tokens * dim * config.out_channels * patch_area
    return embed + config.num_layers * block_forward_flops(config, geometry) + output


def lora_forward_flops(config: CogVideoXConfig, geometry: Geometry, rank: int, targets: Collection[str]) -> int:
    """What a LoRA on the named Linears of every block adds to one forward of one sample."""
    tokens = num_tokens(config, geometry)
    linears = [block_linears(config)[name] for name in targets]
    return config.num_layers * sum(
        2 * rank * (linear.in_features + linear.out_features) * (tokens if linear.per_token else 1)
        for linear in linears
    )
