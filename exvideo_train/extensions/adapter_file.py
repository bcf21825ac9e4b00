"""LoRA files of three programs, and back.

Inside the project an adapter is tensors named as the published checkpoint names modules
(``transformer_blocks.0.attn1.to_q.lora_A.weight``), a rank and an alpha. Each program reads the same update from other
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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from exvideo_train.errors import UserError
from exvideo_train.extensions import peft_config
from exvideo_train.extensions.peft_config import check_alpha, read_json_object, read_lora_config, write_lora_config
from exvideo_train.extensions.provenance import check_provenance
from exvideo_train.files import atomic_save_safetensors, read_safetensors_header, short
from exvideo_train.models.registry import FIRST_FAMILY, family_named

FORMATS = ("diffusers", "diffsynth", "comfyui")

# Our key in a file's header; diffusers' own is peft_config.METADATA_KEY.
PROVENANCE = "exvideo_train"

BLOCK = re.compile(r"(?<=blocks\.)\d+(?=\.)")

TENSOR_NAME = re.compile(r"(?P<module>.+)\.(?P<half>lora_[AB])\.weight")
# What may stand before the module's name (diffusers and ComfyUI, DiffSynth, PEFT) and PEFT's adapter name after it.
FOREIGN_NAME = re.compile(
    r"(?P<prefix>transformer\.|diffusion_model\.|base_model\.model\.)?(?P<module>[a-zA-Z0-9_]+(?:\.[a-zA-Z0-9_]+)*?)"
    r"\.(?P<half>lora_[AB])(?P<adapter>\.[\w -]+)?\.weight"
)
_LONGEST_NAME = 500
# Of safetensors, whose other numbers are no weights that could be multiplied as they are.
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


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
        UserError: unknown format or ending, an alpha out of range, tensors that are no pairs of this rank or not
            finite, a module that DiffSynth has no name for.
    """
    if format not in FORMATS:
        raise UserError(f"format={format}: unknown; use one of {', '.join(FORMATS)}")
    if path.suffix != ".safetensors":
        raise UserError(f"adapter={path}: must end in .safetensors, by which every reader knows the format")
    check_alpha(alpha, f"{path}: alpha")
    modules = _check_pairs(tensors, rank, str(path))
    stated = {**provenance, "rank": rank, "alpha": alpha, "adapter_format": format}
    check_provenance(stated, str(path))
    metadata = {"format": "pt", PROVENANCE: json.dumps(stated, sort_keys=True)}
    if format == "diffusers":
        metadata[peft_config.METADATA_KEY] = write_lora_config(rank, alpha, targets or modules)
    diffsynth_names = family_named(stated.get("family", FIRST_FAMILY), path).diffsynth_names
    folded = 1.0 if format == "diffusers" else alpha / rank
    content = {}
    for module in modules:
        down, up = (tensors[f"{module}.{half}.weight"].detach().float().cpu() for half in ("lora_A", "lora_B"))
        down_name, up_name = _names_in(format, module, diffsynth_names)
        content[down_name] = down.contiguous()
        content[up_name] = (up * folded).contiguous()
    _check_finite(content, str(path))
    atomic_save_safetensors(path, content, metadata)


def _names_in(format: str, module: str, diffsynth_names: Mapping[str, str]) -> tuple[str, str]:
    """Keys of A and B."""
    if format == "diffsynth":
        # With PEFT's adapter name, as DiffSynth's own trainer writes them.
        name = _rename(module, diffsynth_names)
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
        if tensor.ndim != 2 or 0 in tensor.shape or tensor.shape[rank_axis] != rank:
            raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, which is not of rank {rank}")
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is stored as {tensor.dtype}, whose values are no weights")
        modules[match["module"]] = None
    for module in modules:
        for half in ("lora_A", "lora_B"):
            if f"{module}.{half}.weight" not in tensors:
                raise UserError(f"{path}: {module}.{half}.weight is missing; A and B come in pairs")
    return list(modules)


def _check_finite(tensors: Mapping[str, Tensor], path: str) -> None:
    """Of tensors as they are stored or used: a float64 may be too large for float32, an alpha for what it scales."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds values that are not finite; take an earlier checkpoint")


def read_adapter(path: Path, family: str | None = None) -> Adapter:
    """Read an adapter file of any of the three programs, ours or others'.

    A file without diffusers' metadata has alpha equal to rank, as its readers take it.

    Args:
        family: of the model that it is for: one name is DiffSynth's in one family and diffusers' own in another.
            None takes the file's own word, or that of the time when there was one family.

    Raises:
        UserError: the file is missing, truncated or no LoRA, its header is broken or contradicts its tensors, or it
            uses what is not supported here (ranks that differ between modules, DoRA, rank-stabilised scaling).
    """
    header = read_safetensors_header(path)
    metadata: dict[str, str] = header.pop("__metadata__", {})
    provenance = read_provenance(metadata, str(path))
    stated_family = provenance.get("family", FIRST_FAMILY if provenance else family or FIRST_FAMILY)
    if family is not None and family != stated_family:
        raise UserError(f"{path}: an adapter for {short(stated_family)}; the model is {family}: give one for it")
    published = {theirs: ours for ours, theirs in family_named(stated_family, path).diffsynth_names.items()}
    names = _published_names(header, published, str(path))
    rank = next(header[name]["shape"][0 if ".lora_A." in ours else 1] for name, ours in names.items())
    try:
        tensors = {names[name]: tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch or write it again") from error
    modules = _check_pairs(tensors, rank, str(path))
    _check_finite(tensors, str(path))
    alpha, targets = float(rank), tuple(modules)
    stated = metadata.get(peft_config.METADATA_KEY, "")
    if stated:
        alpha, targets = read_lora_config(stated, rank, modules, str(path))
    _check_agreement(provenance, rank, alpha if stated else None, str(path))
    return Adapter(tensors, rank, alpha, targets, provenance)


def _published_names(header: Mapping[str, Any], published: Mapping[str, str], path: str) -> dict[str, str]:
    """Published name of each tensor; number formats and axes are checked too, before a tensor is read."""
    if not header:
        raise UserError(f"{path}: no LoRA tensors; the adapter is empty")
    theirs: dict[str, str] = {}
    first_by_way: dict[tuple[str | None, ...], str] = {}
    for name, entry in header.items():
        match = FOREIGN_NAME.fullmatch(name)
        if match is None or len(name) > _LONGEST_NAME:
            raise UserError(f"{path}: {short(name)} is no LoRA tensor; give an adapter of lora_A and lora_B")
        first_by_way.setdefault(match.group("prefix", "adapter"), name)
        if len(first_by_way) > 1:
            # Of two names for one module, or two adapters in one file, either would be taken silently.
            both = " and ".join(map(short, first_by_way.values()))
            raise UserError(f"{path}: {both} are named in two ways, as of two adapters; write one adapter a file")
        if entry["dtype"] not in _FLOAT_DTYPES:
            raise UserError(f"{path}: {name} is stored as {entry['dtype']}; use one of {', '.join(_FLOAT_DTYPES)}")
        if len(entry["shape"]) != 2 or 0 in entry["shape"]:
            raise UserError(
                f"{path}: {name} has shape {short(entry['shape'])}; A and B have two axes, none of them empty"
            )
        module = _rename(match["module"], published) or match["module"]
        ours = f"{module}.{match['half']}.weight"
        if ours in theirs:
            raise UserError(f"{path}: {theirs[ours]} and {name} are one tensor's names in two programs; write it again")
        theirs[ours] = name
    return {name: ours for ours, name in theirs.items()}


def read_provenance(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """Where a file comes from, by what its header says; empty in other programs' files.

    Raises:
        UserError: it is broken, or a field is not what :func:`write_adapter` puts there.
    """
    provenance = read_json_object(metadata.get(PROVENANCE, "{}"), f"{path}: {PROVENANCE} in its header")
    check_provenance(provenance, path)
    return provenance


def _check_agreement(provenance: Mapping[str, Any], rank: int, alpha: float | None, path: str) -> None:
    """Hold what our header says against the tensors and diffusers' metadata, of which ``alpha`` is None if absent."""
    where = f"{path}: {PROVENANCE} in its header"
    if provenance.get("rank", rank) != rank:
        raise UserError(f"{where}: rank={provenance['rank']}, but its tensors have rank {rank}; write the file again")
    format = provenance.get("adapter_format")
    if format not in (None, *FORMATS):
        raise UserError(f"{where}: adapter_format={short(format)} is unknown; it must be one of {', '.join(FORMATS)}")
    if format is not None and (format == "diffusers") != (alpha is not None):
        # Alpha would be applied twice, or not at all.
        has = "has no" if alpha is None else "has"
        raise UserError(f"{where}: adapter_format={format}, but it {has} {peft_config.METADATA_KEY}; write it again")
    if alpha is not None and provenance.get("alpha", alpha) != alpha:
        raise UserError(f"{where}: alpha={provenance['alpha']}, but lora_alpha={alpha:g}; write the file again")
