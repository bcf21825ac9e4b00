"""From a published ``transformer/`` folder to a network: its config, and every way in which it can be wrong.

The published names are the network's own: nothing is renamed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from exvideo_train.errors import UserError
from exvideo_train.files import short
from exvideo_train.models import component, config_file
from exvideo_train.models.cogvideox.network import CogVideoXConfig, CogVideoXDiT
from exvideo_train.models.cogvideox.published import TRANSFORMER_2B
from exvideo_train.models.config_file import FETCH

CLASS_NAME = "CogVideoXTransformer3DModel"
_STEM = "diffusion_pytorch_model"

# Features of later or other models that share the class: the value that this network has, and what another one means.
_FIXED_FIELDS: dict[str, tuple[Any, str]] = {
    "patch_size_t": (None, "CogVideoX 1.5, which patches time too"),
    "ofs_embed_dim": (None, "CogVideoX 1.5 image-to-video"),
    "use_learned_positional_embeddings": (False, "CogVideoX image-to-video"),
    "patch_bias": (True, "CogVideoX 1.5"),
    "dropout": (0.0, "a model that no published checkpoint is"),
    "activation_fn": ("gelu-approximate", "a model that no published checkpoint is"),
    "timestep_activation_fn": ("silu", "a model that no published checkpoint is"),
}
# An order of magnitude around every published size, so that a broken config is refused before anything is built of it.
_BOUNDS: dict[str, tuple[float, float]] = {
    "num_attention_heads": (1, 512),
    "attention_head_dim": (16, 1024),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "freq_shift": (0, 1),
    "time_embed_dim": (1, 1 << 15),
    "text_embed_dim": (1, 1 << 16),
    "num_layers": (1, 256),
    "sample_width": (1, 4096),
    "sample_height": (1, 4096),
    "sample_frames": (1, 1 << 14),
    "patch_size": (1, 16),
    "temporal_compression_ratio": (1, 64),
    "max_text_seq_length": (1, config_file.MAX_TEXT_LENGTH),
    "norm_eps": (1e-12, 1.0),
    "spatial_interpolation_scale": (1e-3, 1e3),
    "temporal_interpolation_scale": (1e-3, 1e3),
}
_USE_TEXT_TO_VIDEO = "use a text-to-video CogVideoX-2B or CogVideoX-5B"


def read_config(folder: Path) -> CogVideoXConfig:
    """Read ``config.json`` of a ``transformer/`` folder; fields it leaves out have the published class's defaults.

    Raises:
        UserError: the file is missing, is no JSON, is of another class, or of a model with features we do not have.
    """
    path = folder / "config.json"
    fields = config_file.read_config(path)
    config_file.check_class(fields, "_class_name", (CLASS_NAME,), path)
    return config_from_fields(fields, path)


def config_from_fields(fields: Mapping[str, Any], source: Path | str) -> CogVideoXConfig:
    """Check the fields of a ``config.json`` and keep those that shape the network; errors name ``source``."""
    for name, (ours, meaning) in _FIXED_FIELDS.items():
        if fields.get(name, ours) != ours:
            raise UserError(f"{source}: {name}={short(fields[name])} is {meaning}; {_USE_TEXT_TO_VIDEO}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(CogVideoXConfig):
        default = TRANSFORMER_2B[field.name]
        value = fields.get(field.name, default)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{source}: {field.name}={short(value)} should be like {default!r}; {FETCH}")
        values[field.name] = value
    config_file.check_bounds(values, _BOUNDS, source)
    config = CogVideoXConfig(**values)
    if config.in_channels != config.out_channels:
        raise UserError(
            f"{source}: in_channels={config.in_channels} but out_channels={config.out_channels}: the model is "
            f"conditioned on more than text; {_USE_TEXT_TO_VIDEO}"
        )
    # The smallest head whose quarter and three-eighths are whole pairs of channels is 16 wide.
    if config.attention_head_dim % 16:
        raise UserError(
            f"{source}: attention_head_dim={config.attention_head_dim} is no multiple of 16: positions in time, rows "
            f"and columns share a head as 2:3:3; {FETCH}"
        )
    return config


def load(folder: Path, dtype: torch.dtype, device: torch.device | str) -> CogVideoXDiT:
    """Build the network on the meta device and fill it from the folder's safetensors.

    Args:
        folder: a ``transformer/`` folder: shards with an index, or one file, either with or without a variant name.
        dtype: of every parameter.
        device: of every parameter.

    Raises:
        UserError: anything missing, unexpected, misshaped or truncated, before any memory is taken.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = CogVideoXDiT(config)
    component.fill(model, folder, _STEM, dtype, device)
    return model
