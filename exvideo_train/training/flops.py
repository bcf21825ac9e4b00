"""FLOPs of a training step, for the meter: counted by torch on the real network without weights.

Products, convolutions and attention count, two FLOPs for each multiply-add; a fused attention's backward pass counts
2.5 times its forward pass, because the kernel recomputes the map. Element-wise work does not count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from exvideo_train.config.experiment import MemoryConfig, Recompute
from exvideo_train.extensions.extension import Extension
from exvideo_train.geometry import Geometry
from exvideo_train.models.family import Family
from exvideo_train.models.shapes import input_shapes
from exvideo_train.parallel.attention import attend_by_shape
from exvideo_train.parallel.mesh import Mesh
from exvideo_train.parallel.parallelize import parallelize


def step_flops(
    family: Family[Any],
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
        loss = network(inputs.latents_BTCHW, inputs.told_B, **inputs.conditions).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


class Inputs(NamedTuple):
    """What a network is called with."""

    latents_BTCHW: Tensor
    told_B: Tensor
    conditions: dict[str, Tensor]


def empty_inputs(family: Family[Any], config: Any, geometry: Geometry, batch_size: int = 1) -> Inputs:
    """A batch without values, on the current device."""
    latents, conditions = input_shapes(family, config, geometry, batch_size)
    return Inputs(
        torch.empty(latents),
        torch.zeros(batch_size, dtype=torch.int64),
        {n: torch.empty(shape) for n, shape in conditions.items()},
    )
