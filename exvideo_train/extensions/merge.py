"""An adapter added into a published network's weights for good: bf16, in the published shards, tensor by tensor."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from exvideo_train.errors import UserError
from exvideo_train.extensions.adapter_file import Adapter
from exvideo_train.extensions.adapter_names import listed
from exvideo_train.files import atomic_write_json
from exvideo_train.models.component import check_tensors, locate_tensors, read_tensors
from exvideo_train.models.family import Family
from exvideo_train.tensor_files import atomic_stream_safetensors, read_safetensors_header

# Of number formats, in the names of files that hold others than the main one.
_VARIANT = re.compile(r"\.(fp16|bf16|fp32)(?=[-.])")
_BYTES = torch.bfloat16.itemsize


def merge(adapter: Adapter, family: Family[object], model_path: Path, output: Path, strength: float) -> Path:
    """Write ``output/<subfolder>/``, whole or not at all; at no time are more than a tensor and its update in memory.

    Args:
        model_path: a published model's folder.
        output: new, or without that subfolder.
        strength: 1 is as trained.

    Returns:
        the network's folder.

    Raises:
        UserError: the model is not whole, or does not fit the adapter; or the output is there already or not writable.
    """
    source, target = model_path / family.subfolder, output / family.subfolder
    stem = family.weights_stem
    if target.exists():
        raise UserError(f"output={output}: has a {family.subfolder}/ already; name another folder")
    files = locate_tensors(source, stem)
    with torch.device("meta"):
        parameters = dict(family.build(family.read_config(source)).named_parameters())
    check_tensors(source, parameters, files)
    _check_fit(adapter, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, model_path)
    staging = output / f".{family.subfolder}.writing"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        shutil.copyfile(source / "config.json", staging / "config.json")
        weight_map: dict[str, str] = {}
        for shard in sorted(set(files.values())):
            header = read_safetensors_header(shard)
            order = sorted(header.keys() & files.keys(), key=lambda name: header[name]["data_offsets"])
            written = staging / _VARIANT.sub("", shard.name)
            entries = {name: ("BF16", list(header[name]["shape"])) for name in order}
            tensors = read_tensors(dict.fromkeys(order, shard))
            atomic_stream_safetensors(written, entries, _added(adapter, tensors, strength), {"format": "pt"})
            weight_map |= dict.fromkeys(order, written.name)
        if len(set(weight_map.values())) > 1:
            size = sum(parameter.numel() * _BYTES for parameter in parameters.values())
            content = {"metadata": {"total_size": size}, "weight_map": weight_map}
            atomic_write_json(staging / f"{stem}.safetensors.index.json", content)
        staging.rename(target)
    except OSError as error:
        raise UserError(f"output={output}: cannot be written ({error.strerror or error}); free space there") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _check_fit(adapter: Adapter, shapes: dict[str, tuple[int, ...]], model_path: Path) -> None:
    tensors = adapter.tensors
    sizes = {
        m: (tensors[f"{m}.lora_B.weight"].shape[0], tensors[f"{m}.lora_A.weight"].shape[1]) for m in adapter.modules
    }
    if misfits := [module for module, size in sizes.items() if shapes.get(f"{module}.weight") != size]:
        raise UserError(
            f"the adapter does not fit model_path={model_path}: it updates {listed(misfits)}, which it has "
            f"not, or of another size than {sizes[misfits[0]]}; its base model is "
            f"{adapter.provenance.get('base_model', 'not stated')}"
        )


def _added(adapter: Adapter, tensors: Iterator[tuple[str, Tensor]], strength: float) -> Iterator[Tensor]:
    scale = strength * adapter.alpha / adapter.rank
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        down = adapter.tensors.get(f"{module}.lora_A.weight")
        if down is None:
            yield tensor.to(torch.bfloat16)
            continue
        update = adapter.tensors[f"{module}.lora_B.weight"] @ down
        merged = update.mul_(scale).add_(tensor).to(torch.bfloat16)
        if not torch.isfinite(merged).all():
            raise UserError(f"{name}: not finite with the update; use a smaller strength than {strength:g}")
        yield merged
