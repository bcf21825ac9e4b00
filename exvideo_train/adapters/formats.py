"""Adapter files of three program families, and back.

Inside the project an adapter is tensors named as the published checkpoint names modules
(``transformer_blocks.0.attn1.to_q.lora_A.weight``), a rank and an alpha. Each family reads the same update from other
names, and only diffusers can be told alpha: for the others ``alpha / rank`` is folded into B.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from exvideo_train.errors import UserError
from exvideo_train.files import atomic_save_safetensors, read_safetensors_header

FORMATS = ("diffusers", "diffsynth", "comfyui")

# Header keys: diffusers' own (loaders/lora_base.py), and ours.
DIFFUSERS_METADATA = "lora_adapter_metadata"
PROVENANCE = "exvideo_train"

# Linears of CogVideoX in the published checkpoint and in DiffSynth-Studio <= 1.1.9 (models/cog_dit.py); {n} is a block.
DIFFSYNTH_NAMES = {
    "patch_embed.text_proj": "context_embedder",
    "time_embedding.linear_1": "time_embedder.timestep_embedder.0",
    "time_embedding.linear_2": "time_embedder.timestep_embedder.2",
    "transformer_blocks.{n}.norm1.linear": "blocks.{n}.norm1.linear",
    "transformer_blocks.{n}.norm2.linear": "blocks.{n}.norm2.linear",
    "transformer_blocks.{n}.attn1.to_q": "blocks.{n}.attn1.to_q",
    "transformer_blocks.{n}.attn1.to_k": "blocks.{n}.attn1.to_k",
    "transformer_blocks.{n}.attn1.to_v": "blocks.{n}.attn1.to_v",
    "transformer_blocks.{n}.attn1.to_out.0": "blocks.{n}.attn1.to_out",
    "transformer_blocks.{n}.ff.net.0.proj": "blocks.{n}.ff.0",
    "transformer_blocks.{n}.ff.net.2": "blocks.{n}.ff.2",
    "norm_out.linear": "norm_out.linear",
    "proj_out": "proj_out",
}
PUBLISHED_NAMES = {theirs: published for published, theirs in DIFFSYNTH_NAMES.items()}
BLOCK = re.compile(r"(?<=blocks\.)\d+(?=\.)")

TENSOR_NAME = re.compile(r"(?P<module>.+)\.(?P<half>lora_[AB])\.weight")
# What may stand before the module's name (diffusers and ComfyUI, DiffSynth, PEFT) and PEFT's adapter name after it.
FOREIGN_NAME = re.compile(
    r"(?:transformer\.|diffusion_model\.|base_model\.model\.)?(?P<module>.+?)\.(?P<half>lora_[AB])(?:\.[^.]+)?\.weight"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter in the project's own terms.

    Args:
        tensors: float32, published names; A is (rank, in), B is (out, rank).
        alpha: the update is ``alpha / rank * B @ A``.
        targets: names or suffixes of names of the adapted Linears.
        provenance: base model, rank, alpha, frames, steps, commit; empty in other programs' files.
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    targets: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)


def write_adapter(
    path: Path,
    format: str,
    tensors: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    targets: Sequence[str],
    provenance: Mapping[str, Any],
) -> None:
    """Write an adapter file, whole or not at all.

    Args:
        path: ends in ``.safetensors``.
        format: ``diffusers`` (also PEFT), ``diffsynth`` or ``comfyui``.
        tensors: published names; stored as float32.
        targets: what was asked to be adapted; goes into diffusers' metadata.
        provenance: JSON values for the header; rank, alpha and format are added.

    Raises:
        UserError: unknown format or ending, tensors that are no pairs of this rank or not finite, a module that
            DiffSynth has no name for.
    """
    if format not in FORMATS:
        raise UserError(f"format={format}: unknown; use one of {', '.join(FORMATS)}")
    if path.suffix != ".safetensors":
        raise UserError(f"adapter={path}: must end in .safetensors, by which every reader knows the format")
    modules = _check_pairs(tensors, rank, str(path))
    metadata = {
        "format": "pt",
        PROVENANCE: json.dumps({**provenance, "rank": rank, "alpha": alpha, "adapter_format": format}, sort_keys=True),
    }
    if format == "diffusers":
        metadata[DIFFUSERS_METADATA] = _diffusers_metadata(rank, alpha, targets or modules)
    folded = 1.0 if format == "diffusers" else alpha / rank
    content = {}
    for module in modules:
        down, up = (tensors[f"{module}.{half}.weight"].detach().float().cpu() for half in ("lora_A", "lora_B"))
        down_name, up_name = _names_in(format, module)
        content[down_name] = down.contiguous()
        content[up_name] = (up * folded).contiguous()
    atomic_save_safetensors(path, content, metadata)


def _names_in(format: str, module: str) -> tuple[str, str]:
    """Keys of A and B."""
    if format == "diffsynth":
        # With PEFT's adapter name, as DiffSynth's own trainer writes them.
        name = _rename(module, DIFFSYNTH_NAMES)
        if name is None:
            raise UserError(
                f"format=diffsynth: DiffSynth has no name for {module}, and it ignores a file with one unknown key; "
                "use format=diffusers, or train without that target"
            )
        return f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
    return f"transformer.{module}.lora_A.weight", f"transformer.{module}.lora_B.weight"


def _rename(module: str, table: Mapping[str, str]) -> str | None:
    blocks = BLOCK.findall(module)
    renamed = table.get(BLOCK.sub("{n}", module))
    return renamed.format(n=blocks[0]) if renamed and blocks else renamed


def _diffusers_metadata(rank: int, alpha: float, targets: Sequence[str]) -> str:
    """The fields of PEFT's LoraConfig that say what the file is; a fuller one is refused by older PEFT."""
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": False,
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps({f"transformer.{name}": value for name, value in config.items()}, indent=2, sort_keys=True)


def _check_pairs(tensors: Mapping[str, Tensor], rank: int, path: str) -> list[str]:
    """Module names, once each, in order."""
    if not tensors:
        raise UserError(f"{path}: no LoRA tensors; the adapter is empty")
    modules: dict[str, None] = {}
    for name, tensor in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{path}: {name} is no LoRA tensor; names end in .lora_A.weight or .lora_B.weight")
        rank_axis = 0 if match["half"] == "lora_A" else 1
        if tensor.ndim != 2 or tensor.shape[rank_axis] != rank:
            raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, which is not of rank {rank}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds values that are not finite; take an earlier checkpoint")
        modules[match["module"]] = None
    for module in modules:
        for half in ("lora_A", "lora_B"):
            if f"{module}.{half}.weight" not in tensors:
                raise UserError(f"{path}: {module}.{half}.weight is missing; A and B come in pairs")
    return list(modules)


def read_adapter(path: Path) -> Adapter:
    """Read an adapter file of any of the three families, ours or others'.

    A file without diffusers' metadata has alpha equal to rank, as its readers take it.

    Raises:
        UserError: the file is missing, truncated or no LoRA, or uses what is not supported here (ranks that differ
            between modules, DoRA, rank-stabilised scaling).
    """
    header = read_safetensors_header(path)
    metadata: dict[str, str] = header.get("__metadata__", {})
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        match = FOREIGN_NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{path}: {name} is no LoRA tensor; give an adapter for CogVideoX (lora_A and lora_B)")
        module = _rename(match["module"], PUBLISHED_NAMES) or match["module"]
        tensors[f"{module}.{match['half']}.weight"] = tensor.float()
    if not tensors:
        raise UserError(f"{path}: no LoRA tensors; the adapter is empty")
    first_up = next((tensor for name, tensor in tensors.items() if ".lora_B." in name), None)
    rank = int(first_up.shape[-1]) if first_up is not None else 0
    modules = _check_pairs(tensors, rank, str(path))
    config = _read_json(path, metadata, DIFFUSERS_METADATA)
    alpha = _alpha(path, {name.removeprefix("transformer."): value for name, value in config.items()}, rank)
    targets = config.get("transformer.target_modules") or modules
    return Adapter(tensors, rank, alpha, tuple(targets), _read_json(path, metadata, PROVENANCE))


def _alpha(path: Path, config: Mapping[str, Any], rank: int) -> float:
    for name in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora"):
        if config.get(name):
            raise UserError(f"{path}: {name}={config[name]} in its header is not supported; merge it with PEFT first")
    if config.get("r", rank) != rank:
        raise UserError(f"{path}: its header says rank {config['r']}, its tensors have rank {rank}; write it again")
    return float(config.get("lora_alpha", rank))


def _read_json(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except ValueError as error:
        raise UserError(f"{path}: {key} in its header is not JSON ({error}); write the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} in its header is not an object; write the file again")
    return value
