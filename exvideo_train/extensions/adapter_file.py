"""LoRA files of other programs, and back.

Inside the project an adapter is tensors named as the published checkpoint names modules
(``transformer_blocks.0.attn1.to_q.lora_A.weight``), a rank and an alpha. Each program reads the same update from other
names (:mod:`exvideo_train.extensions.adapter_names`), and diffusers, PEFT and Kohya's can be told alpha: for the others
``alpha / rank`` is folded into B.
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
from exvideo_train.extensions.adapter_names import FORMATS, STATES_ALPHA, listed, modules_of, names_in, our_names
from exvideo_train.extensions.peft_config import check_alpha, read_json_object, read_lora_config, write_lora_config
from exvideo_train.extensions.provenance import check_provenance
from exvideo_train.files import atomic_write_text, read_regular, short
from exvideo_train.models.registry import FIRST_FAMILY, family_named
from exvideo_train.tensor_files import atomic_save_safetensors, read_safetensors_header

# Our key in a file's header; diffusers' own is peft_config.METADATA_KEY.
PROVENANCE = "exvideo_train"

TENSOR_NAME = re.compile(r"(?P<module>.+)\.(?P<half>lora_[AB])\.weight")
# Of safetensors, whose other numbers are no weights that could be multiplied as they are.
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_ALPHA_DTYPES = (*_FLOAT_DTYPES, "I64", "I32")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MAX_CONFIG_BYTES = 1 << 20


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

    @property
    def modules(self) -> list[str]:
        """The updated modules, in the file's order."""
        return modules_of(self.tensors)


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
        format: ``diffusers`` (also PEFT), ``diffsynth``, ``comfyui``, ``kohya``, or ``peft``, whose
            ``adapter_config.json`` is written beside it.
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
    if format == "peft" and path.name != PEFT_WEIGHTS:
        raise UserError(
            f"adapter={path}: PEFT reads a folder's {PEFT_WEIGHTS}; name the file so, in a folder of its own"
        )
    check_alpha(alpha, f"{path}: alpha")
    modules = _check_pairs(tensors, rank, str(path))
    stated = {**provenance, "rank": rank, "alpha": alpha, "adapter_format": format}
    check_provenance(stated, str(path))
    metadata = {"format": "pt", PROVENANCE: json.dumps(stated, sort_keys=True)}
    if format == "diffusers":
        metadata[peft_config.METADATA_KEY] = write_lora_config(rank, alpha, targets or modules)
    diffsynth_names = family_named(stated.get("family", FIRST_FAMILY), path).diffsynth_names
    folded = 1.0 if format in STATES_ALPHA else alpha / rank
    content = {}
    for module in modules:
        down, up = (tensors[f"{module}.{half}.weight"].detach().float().cpu() for half in ("lora_A", "lora_B"))
        down_name, up_name, alpha_name = names_in(format, module, diffsynth_names)
        content[down_name] = down.contiguous()
        content[up_name] = (up * folded).contiguous()
        if format == "kohya":
            content[alpha_name] = torch.tensor(float(alpha))
    _check_finite(content, str(path))
    if format == "peft":
        # First: without it the weights would be taken to have an alpha of PEFT's default.
        config = write_lora_config(rank, alpha, targets or modules, prefix="")
        atomic_write_text(path.with_name(PEFT_CONFIG), config + "\n")
    atomic_save_safetensors(path, content, metadata)


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
    """Read an adapter file of any of these programs, ours or others', or PEFT's folder.

    A file that states no alpha has alpha equal to rank, as its readers take it.

    Args:
        family: of the model that it is for: one name is DiffSynth's in one family and diffusers' own in another.
            None takes the file's own word, or that of the time when there was one family.

    Raises:
        UserError: the file is missing, truncated or no LoRA, its header is broken or contradicts its tensors, or it
            uses what is not supported here (ranks that differ between modules, DoRA, rank-stabilised scaling).
    """
    if path.is_dir() and (path / PEFT_WEIGHTS).is_file():
        path = path / PEFT_WEIGHTS
    header = read_safetensors_header(path)
    metadata: dict[str, str] = header.pop("__metadata__", {})
    provenance = read_provenance(metadata, str(path))
    stated_family = provenance.get("family", FIRST_FAMILY if provenance else family or FIRST_FAMILY)
    if family is not None and family != stated_family:
        raise UserError(f"{path}: an adapter for {short(stated_family)}; the model is {family}: give one for it")
    names = _checked_names(header, family_named(stated_family, path).diffsynth_names, str(path))
    try:
        content = {names[name]: tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch or write it again") from error
    tensors = {name: content[name].float() for name in names.values() if not name.endswith(".alpha")}
    name, first = next(iter(tensors.items()), ("", torch.empty(0, 0)))
    rank = first.shape[0 if name.endswith(".lora_A.weight") else 1]
    modules = _check_pairs(tensors, rank, str(path))
    alphas = _read_alphas(content, modules, str(path))
    _check_finite(tensors, str(path))
    alpha, targets = float(rank), tuple(modules)
    stated = _stated_config(path, header, metadata)
    if stated is not None:
        alpha, targets = read_lora_config(stated[0], rank, modules, where=stated[1])
    if alphas:
        alpha = _take_alphas(alphas, alpha if stated else None, provenance, tensors, rank, str(path))
    _check_agreement(provenance, rank, alpha if stated or alphas else None, str(path))
    return Adapter(tensors, rank, alpha, targets, provenance)


def _stated_config(
    path: Path, header: Mapping[str, Any], metadata: Mapping[str, str]
) -> tuple[str | bytes, str] | None:
    """A LoraConfig as JSON and where it stands: in diffusers' header, or in the file beside PEFT's weights."""
    if metadata.get(peft_config.METADATA_KEY):
        return metadata[peft_config.METADATA_KEY], f"{path}: {peft_config.METADATA_KEY} in its header"
    beside = path.with_name(PEFT_CONFIG)
    if path.name == PEFT_WEIGHTS and beside.exists() and all(name.startswith("base_model.model.") for name in header):
        return read_regular(beside, _MAX_CONFIG_BYTES), str(beside)
    return None


def _read_alphas(content: Mapping[str, Tensor], modules: Sequence[str], path: str) -> dict[str, float]:
    """Kohya's alpha of each module, or of none."""
    alphas = {
        name.removesuffix(".alpha"): check_alpha(tensor.item(), f"{path}: {name}")
        for name, tensor in content.items()
        if name.endswith(".alpha")
    }
    # Without one, a reader takes the rank: beside others it was lost.
    if alphas and (odd := sorted(alphas.keys() ^ set(modules))):
        raise UserError(f"{path}: alpha and A and B do not belong to the same modules: {listed(odd)}; fetch it again")
    return alphas


def _take_alphas(
    alphas: Mapping[str, float],
    stated: float | None,
    provenance: Mapping[str, Any],
    tensors: dict[str, Tensor],
    rank: int,
    path: str,
) -> float:
    """One alpha for all modules; where theirs differ it is the rank, and each is folded into its B."""
    # Alpha as a file's text has it; its tensors are float32.
    exact = [float(alpha) for alpha in (stated, provenance.get("alpha")) if alpha is not None]
    if len(set(alphas.values())) == 1:
        own = next(iter(alphas.values()))
        alpha = next((alpha for alpha in exact if torch.tensor(alpha).item() == own), own)
    else:
        alpha = float(rank)
        for module, own in alphas.items():
            tensors[f"{module}.lora_B.weight"] *= own / rank
        _check_finite(tensors, path)
    if stated is not None and stated != alpha:
        raise UserError(f"{path}: its alpha tensors say {alpha:g}, but lora_alpha={stated:g}; write the file again")
    return alpha


def _checked_names(header: Mapping[str, Any], diffsynth_names: Mapping[str, str], path: str) -> dict[str, str]:
    """Our name of each tensor; number formats and axes are checked too, before a tensor is read."""
    if not header:
        raise UserError(f"{path}: no LoRA tensors; the adapter is empty")
    names = our_names(header, diffsynth_names, path)
    for name, entry in header.items():
        is_alpha = names[name].endswith(".alpha")
        dtypes = _ALPHA_DTYPES if is_alpha else _FLOAT_DTYPES
        if entry["dtype"] not in dtypes:
            raise UserError(f"{path}: {name} is stored as {entry['dtype']}; use one of {', '.join(dtypes)}")
        if is_alpha and entry["shape"] not in ([], [1]):
            raise UserError(f"{path}: {name} has shape {short(entry['shape'])}; alpha is one number")
        if not is_alpha and (len(entry["shape"]) != 2 or 0 in entry["shape"]):
            raise UserError(
                f"{path}: {name} has shape {short(entry['shape'])}; A and B have two axes, none of them empty"
            )
    return names


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
    if format is not None and (format in STATES_ALPHA) != (alpha is not None):
        # Alpha would be applied twice, or not at all.
        has = "has no" if alpha is None else "has"
        places = f"{peft_config.METADATA_KEY}, {PEFT_CONFIG} or alpha tensors"
        raise UserError(f"{where}: adapter_format={format}, but it {has} {places}; write it again")
    if alpha is not None and provenance.get("alpha", alpha) != alpha:
        raise UserError(f"{where}: alpha={provenance['alpha']}, but lora_alpha={alpha:g}; write the file again")
