"""FLOPs of a training step, for the meter: counted by torch on the real network without weights.

Products, convolutions and attention count, two FLOPs for each multiply-add; a fused attention's backward pass counts
2.5 times its forward pass, because the kernel recomputes the map. Element-wise work does not count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from exvideo_train.config.experiment import MemoryConfig, Recompute
from exvideo_train.extensions.extension import Extension
from exvideo_train.geometry import Geometry
from exvideo_train.models.family import BackboneFamily
from exvideo_train.parallel.attention import attend_by_shape
from exvideo_train.parallel.mesh import Mesh
from exvideo_train.parallel.parallelize import parallelize


def step_flops(
    family: BackboneFamily[Any],
    config: Any,
    extension: Extension,
    geometry: Geometry,
    recompute: Recompute = Recompute.none,
) -> tuple[int, int]:
    """(forward, backward) FLOPs of one sample, over all ranks that share it.

    Args:
        config: of the family's networks.
        recompute: what the backward pass computes again; counted in it.

    Raises:
        UserError: the extension does not fit the network.
    """
    with torch.device("meta"):
        network = family.build(config)
        inputs = empty_inputs(family, config, geometry)
    extension.attach(network, seed=0)
    network.train()
    mesh, memory = Mesh(0, 1, 1, torch.device("meta")), MemoryConfig(recompute=recompute)
    parallelize(network, memory, mesh, torch.float32, extension.has_dropout, attend_by_shape)
    with FlopCounterMode(display=False) as counter:
        loss = network(*inputs).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def empty_inputs(
    family: BackboneFamily[Any], config: Any, geometry: Geometry, batch_size: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """latents_BTCHW, told_B and text_BLC without values, on the current device."""
    latent_channels, text_channels = family.sample_channels(config)
    latents_BTCHW = torch.empty(
        batch_size, geometry.num_latent_frames, latent_channels, geometry.latent_height, geometry.latent_width
    )
    text_BLC = torch.empty(batch_size, family.text_length(config), text_channels)
    return latents_BTCHW, torch.zeros(batch_size, dtype=torch.int64), text_BLC
