"""Shapes of what a family stores and what its network is called with, from the config alone.

Axis letters: B batch, T latent frames, C channel, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from exvideo_train.geometry import Geometry
from exvideo_train.models.family import Family


class InputShapes(NamedTuple):
    """Of a batch: (B, T, C, H, W), and of each condition."""

    latents: tuple[int, ...]
    conditions: dict[str, tuple[int, ...]]


def stored_shapes(family: Family[Any], config: Any, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Of the tensors that are stored of a clip."""
    return shapes_of(family, geometry, family.stored_channels(config), family.text_length(config))


def shapes_of(
    family: Family[Any], geometry: Geometry, channels: Mapping[str, int], text_length: int | None
) -> dict[str, tuple[int, ...]]:
    """The same by the channels of each tensor and the text length, wherever they are known from."""
    stored = family.stored(family.grid.shape_THW(geometry), text_length)
    return {
        name: tuple(channels[name] if axis is None else axis for axis in tensor.shape)
        for name, tensor in stored.items()
    }


def input_shapes(family: Family[Any], config: Any, geometry: Geometry, batch_size: int) -> InputShapes:
    """Of what the network is called with; a latent's channels are those stored, of a mean and log-variance the half."""
    shapes = stored_shapes(family, config, geometry)
    stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    conditions = family.conditions(stored, stored, False)
    num_stored, frames, rows, columns = shapes[family.latents_name]
    divide_by = family.stored((frames, rows, columns), None)[family.latents_name].channels_divide_by
    return InputShapes(
        (batch_size, frames, num_stored // divide_by, rows, columns),
        {name: (batch_size, *tensor.shape) for name, tensor in conditions.items()},
    )
