"""diffusers' ``lora_adapter_metadata``: the fields of PEFT's LoraConfig in an adapter file's header, and back.

A field that this project does not understand must be empty: it could change the update.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from typing import Any

from exvideo_train.config.experiment import ALPHA
from exvideo_train.errors import UserError
from exvideo_train.files import parse_json, short

# Header key (diffusers, loaders/lora_base.py) and the prefix that every field has in it.
METADATA_KEY = "lora_adapter_metadata"
_PREFIX = "transformer."
# How an adapter was trained, not what it computes; or which Linears it was put on, which its tensors say.
_NOTES = {
    *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "task_type"),
}
# Values other than empty that fields may have. The other initialisations (PiSSA, OLoRA, LoftQ, ...) change the base
# model's weights, which the adapter then needs.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def write_lora_config(rank: int, alpha: float, targets: Sequence[str], prefix: str = _PREFIX) -> str:
    """The fields that say what the file is; a fuller config is refused by older PEFT."""
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
    return json.dumps({f"{prefix}{name}": value for name, value in config.items()}, indent=2, sort_keys=True)


def read_lora_config(
    text: str | bytes, rank: int, modules: Collection[str], where: str
) -> tuple[float, tuple[str, ...]]:
    """Alpha and targets of a file whose tensors have ``rank`` and update ``modules``; ``where`` is named in errors.

    Raises:
        UserError: it is broken, contradicts the tensors, or has a field set that is not understood here.
    """
    fields = read_json_object(text, where)
    config = {name.removeprefix(_PREFIX): value for name, value in fields.items()}
    if len(config) != len(fields):
        raise UserError(f"{where} states a field twice, with and without {_PREFIX!r}; write the file again")
    rank_stated = config.pop("r", None)
    if type(rank_stated) is not int or rank_stated != rank:
        raise UserError(f"{where}: r={short(rank_stated)}, but its tensors have rank {rank}; write the file again")
    alpha = check_alpha(config.pop("lora_alpha", None), f"{where}: lora_alpha")
    targets = _check_targets(config.pop("target_modules", None), modules, where)
    for name, value in config.items():
        if value and name not in _NOTES and value not in _ALLOWED.get(name, ()):
            raise UserError(f"{where}: {short(name)}: {short(value)} is not supported; merge it with PEFT first")
    return alpha, targets


def read_json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """A header's value that is an object as JSON text.

    Raises:
        UserError: it is no strict JSON, or no object.
    """
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); write the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not an object; write the file again")
    return value


def check_alpha(alpha: Any, what: str) -> float:
    """``alpha`` as a number that float32 can multiply with; ``what`` is named in the error.

    Raises:
        UserError: it is anything else.
    """
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and math.isfinite(alpha)
    if not number or alpha not in ALPHA:
        raise UserError(f"{what}={short(alpha)}: must be a number {ALPHA}")
    return float(alpha)


def _check_targets(targets: Any, modules: Collection[str], where: str) -> tuple[str, ...]:
    if targets is None or isinstance(targets, str):
        # PEFT takes a text for a regular expression. The tensors say what it matched, so it need not be run.
        return tuple(modules)
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) and name for name in targets):
        raise UserError(f"{where}: target_modules={short(targets)} is not a list of names; write the file again")
    covered = {module: _suffixes(module) & set(targets) for module in modules}
    if uncovered := [module for module, matches in covered.items() if not matches]:
        raise UserError(f"{where}: target_modules leave out {uncovered[0]}, which has tensors; write the file again")
    if unmatched := sorted(set(targets).difference(*covered.values())):
        raise UserError(f"{where}: target_modules name {short(unmatched[0])}, which has no tensors; write it again")
    return tuple(targets)


def _suffixes(module: str) -> set[str]:
    """``a.b.c`` -> ``a.b.c``, ``b.c``, ``c``: what PEFT takes for a target of it."""
    parts = module.split(".")
    return {".".join(parts[index:]) for index in range(len(parts))}
