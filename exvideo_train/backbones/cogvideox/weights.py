"""From a published ``transformer/`` folder to a network: config, shards, and every way in which they can be wrong.

The published names are the network's own: nothing is renamed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from exvideo_train.backbones.cogvideox.model import CogVideoXConfig, CogVideoXDiT
from exvideo_train.backbones.cogvideox.published import TRANSFORMER_2B
from exvideo_train.errors import UserError
from exvideo_train.files import read_safetensors_header

CLASS_NAME = "CogVideoXTransformer3DModel"
_STEM = "diffusion_pytorch_model"
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_FETCH = "download the model folder again, or correct model.path"

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
_USE_TEXT_TO_VIDEO = "use a text-to-video CogVideoX-2B or CogVideoX-5B"


def read_config(folder: Path) -> CogVideoXConfig:
    """Read ``config.json`` of a ``transformer/`` folder; fields it leaves out have the published class's defaults.

    Raises:
        UserError: the file is missing, is no JSON, is of another class, or of a model with features we do not have.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_FETCH}") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); {_FETCH}") from None
    if not isinstance(fields, dict) or fields.get("_class_name") != CLASS_NAME:
        found = fields.get("_class_name") if isinstance(fields, dict) else type(fields).__name__
        raise UserError(f"{path}: _class_name={found!r} instead of {CLASS_NAME!r}; correct model.path")
    return config_from_fields(fields, path)


def config_from_fields(fields: Mapping[str, Any], source: Path | str) -> CogVideoXConfig:
    """Check the fields of a ``config.json`` and keep those that shape the network; errors name ``source``."""
    for name, (ours, meaning) in _FIXED_FIELDS.items():
        if fields.get(name, ours) != ours:
            raise UserError(f"{source}: {name}={fields[name]!r} is {meaning}; {_USE_TEXT_TO_VIDEO}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(CogVideoXConfig):
        default = TRANSFORMER_2B[field.name]
        value = fields.get(field.name, default)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{source}: {field.name}={value!r} should be like {default!r}; {_FETCH}")
        values[field.name] = value
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
            f"and columns share a head as 2:3:3; {_FETCH}"
        )
    return config


def load(folder: Path, dtype: torch.dtype, device: torch.device | str) -> CogVideoXDiT:
    """Build the network and fill it from the folder's safetensors, each tensor once.

    Built on the meta device, then filled tensor by tensor from memory-mapped shards: at no time do two copies of the
    weights exist. On the CPU in the stored dtype the parameters *are* the mapped file (private, copied on write), so
    that processes of one machine share its pages.

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
    file_by_name = locate_tensors(folder)
    _check_tensors(folder, dict(model.named_parameters()), file_by_name)
    names_by_file: dict[Path, list[str]] = {}
    for name, path in file_by_name.items():
        names_by_file.setdefault(path, []).append(name)
    for path, names in names_by_file.items():
        with safe_open(path, framework="pt", device=str(device)) as shard:
            for name in names:
                _assign(model, name, shard.get_tensor(name).to(device=device, dtype=dtype))
    return model


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    setattr(model.get_submodule(module_name), parameter_name, nn.Parameter(tensor))


def locate_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the index or, where one file holds all, from its header.

    Raises:
        UserError: no weights, several variants and no plain one, or an index that names a file that is not there.
    """
    index = _choose(folder, f"{_STEM}.safetensors.index.json", f"{_STEM}.safetensors.index.*.json")
    if index is not None:
        return _read_index(index)
    single = _choose(folder, f"{_STEM}.safetensors", f"{_STEM}.*.safetensors")
    if single is not None:
        return {name: single for name in read_safetensors_header(single) if name != "__metadata__"}
    hint = ""
    if any(folder.glob("*.bin")):
        hint = " (only pickled .bin files, which can run code when they are loaded: convert them to safetensors)"
    raise UserError(f"{folder}: holds neither {_STEM}.safetensors nor {_STEM}.safetensors.index.json{hint}; {_FETCH}")


def _choose(folder: Path, plain: str, variants: str) -> Path | None:
    """The plain file if there is one, else the only variant of it (``fp16`` and the like)."""
    if (folder / plain).is_file():
        return folder / plain
    found = sorted(folder.glob(variants))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: holds several variants ({names}) and no {plain}; keep one of them")
    return found[0] if found else None


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        file_by_name = {str(name): path.parent / str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no safetensors index ({error!r}); {_FETCH}") from None
    for file in sorted(set(file_by_name.values())):
        if not file.is_file():
            raise UserError(f"{file}: missing, though {path.name} names it; {_FETCH}")
    return file_by_name


def _check_tensors(folder: Path, parameters: Mapping[str, nn.Parameter], file_by_name: Mapping[str, Path]) -> None:
    """Compare names, shapes and kinds with the network, from the files' headers alone."""
    if missing := sorted(parameters.keys() - file_by_name.keys()):
        raise UserError(
            f"{folder}: {_count(missing)} missing from the weights, though config.json asks for it; {_FETCH}"
        )
    if unexpected := sorted(file_by_name.keys() - parameters.keys()):
        raise UserError(
            f"{file_by_name[unexpected[0]]}: {_count(unexpected)} not part of the network that config.json "
            f"describes; {_FETCH}"
        )
    headers = {path: read_safetensors_header(path) for path in sorted(set(file_by_name.values()))}
    for name, path in file_by_name.items():
        entry = headers[path].get(name)
        if entry is None:
            raise UserError(f"{path}: {name} missing, though the index says it is here; {_FETCH}")
        expected = list(parameters[name].shape)
        if entry["shape"] != expected:
            raise UserError(f"{path}: {name} has shape {entry['shape']}, config.json makes it {expected}; {_FETCH}")
        if entry["dtype"] not in _FLOAT_DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {entry['dtype']}, a quantised form; use the model's unquantised weights"
            )


def _count(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
