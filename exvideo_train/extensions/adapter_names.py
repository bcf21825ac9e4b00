"""What programs call an adapter's tensors, and the project's own names of them: tables and their inverse.

Ours are the published checkpoint's module names with ``.lora_A.weight``, ``.lora_B.weight`` and, where a program keeps
it as a tensor, ``.alpha``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from exvideo_train.errors import UserError
from exvideo_train.files import short

FORMATS = ("diffusers", "diffsynth", "comfyui", "peft", "kohya")
# Those that can be told alpha; into the others' B it is folded.
STATES_ALPHA = ("diffusers", "peft", "kohya")

BLOCK = re.compile(r"(?<=blocks\.)\d+(?=\.)")
_FLAT_BLOCK = re.compile(r"(?<=blocks_)\d+(?=_)")
# Kohya's trainers write modules with underscores for dots; the second form is of networks whose root has no name.
_FLAT_PREFIX = re.compile(r"lora_(unet__?|transformer_)(?=[a-z])")
_HALVES = {
    **{"lora_A": "lora_A.weight", "lora_down": "lora_A.weight", "lora.down": "lora_A.weight"},
    **{"lora_B": "lora_B.weight", "lora_up": "lora_B.weight", "lora.up": "lora_B.weight"},
}
# What may stand before the module's name (diffusers and ComfyUI, DiffSynth, PEFT) and PEFT's adapter name after it.
_MODULE = (
    r"(?P<prefix>transformer\.|diffusion_model\.|base_model\.model\.)?(?P<module>[a-zA-Z0-9_]+(?:\.[a-zA-Z0-9_]+)*?)"
)
_PEFT_NAME = re.compile(_MODULE + r"\.(?P<half>lora_[AB])(?P<adapter>\.[\w -]+)?\.weight")
_KOHYA_NAME = re.compile(_MODULE + r"\.(?:(?P<half>lora[._](?:down|up))(?P<adapter>)\.weight|alpha)")
_LONGEST_NAME = 500
_MOST_LISTED = 4


def names_in(format: str, module: str, diffsynth_names: Mapping[str, str]) -> tuple[str, str, str]:
    """Keys of A, B and alpha of a module, in a program's file.

    Raises:
        UserError: the program has no name for it.
    """
    if format in ("diffusers", "comfyui"):
        stem, ends = f"transformer.{module}", ("lora_A.weight", "lora_B.weight")
    elif format == "peft":
        stem, ends = f"base_model.model.{module}", ("lora_A.weight", "lora_B.weight")
    else:
        theirs = rename(module, diffsynth_names)
        if theirs is None:
            raise UserError(
                f"format={format}: no name for {module} there, and one unknown key makes a file of no use; "
                "use format=diffusers, or train without that target"
            )
        if format == "kohya":
            stem, ends = f"lora_unet_{module.replace('.', '_')}", ("lora_down.weight", "lora_up.weight")
        else:
            # With PEFT's adapter name, as DiffSynth's own trainer writes them.
            stem, ends = theirs, ("lora_A.default.weight", "lora_B.default.weight")
    return f"{stem}.{ends[0]}", f"{stem}.{ends[1]}", f"{stem}.alpha"


def rename(module: str, table: Mapping[str, str]) -> str | None:
    """A module by a table in which ``{n}`` stands for its block; None if it is not there."""
    blocks = BLOCK.findall(module)
    renamed = table.get(BLOCK.sub("{n}", module))
    return renamed.format(n=blocks[0]) if renamed and blocks else renamed


def our_names(names: Iterable[str], diffsynth_names: Mapping[str, str], path: str) -> dict[str, str]:
    """Our name of each of a file's.

    Args:
        diffsynth_names: of the family.
        path: named in errors.

    Raises:
        UserError: names that are no LoRA tensor's, all of them told; names of two ways, or two of one tensor.
    """
    published = {theirs: ours for ours, theirs in diffsynth_names.items()}
    flat = {name.replace(".", "_"): ours for ours, theirs in diffsynth_names.items() for name in (theirs, ours)}
    ours_by_name: dict[str, str] = {}
    unknown: list[str] = []
    first_by_way: dict[tuple[str | None, ...], str] = {}
    names = list(names)
    has_kohya = any(name.endswith(("down.weight", "up.weight")) for name in names)
    for name in names:
        match = None
        if len(name) <= _LONGEST_NAME:
            match = _PEFT_NAME.fullmatch(name) or (_KOHYA_NAME.fullmatch(name) if has_kohya else None)
        module = match and _published_module(match["module"], published, flat)
        if match is None or module is None:
            unknown.append(name)
            continue
        is_kohya = match.re is _KOHYA_NAME
        prefix = _FLAT_PREFIX.match(match["module"])
        # A flat name never has a dotted prefix too.
        way = (prefix[0] if prefix else match["prefix"], match["adapter"] or None, "kohya" if is_kohya else None)
        first_by_way.setdefault(way, name)
        ours_by_name[name] = f"{module}.{_HALVES[match['half']] if match['half'] else 'alpha'}"
    if unknown:
        is_not = "is no LoRA tensor" if len(unknown) == 1 else "are no LoRA tensors"
        raise UserError(f"{path}: {listed(unknown)} {is_not} of a module known here; give an adapter of A and B alone")
    if len(first_by_way) > 1:
        # Of two names for one module, or two adapters in one file, either would be taken silently.
        both = " and ".join(short(name) for name in list(first_by_way.values())[:_MOST_LISTED])
        raise UserError(f"{path}: {both} are named in two ways, as of two adapters; write one adapter a file")
    theirs: dict[str, str] = {}
    for name, ours in ours_by_name.items():
        if ours in theirs:
            raise UserError(f"{path}: {theirs[ours]} and {name} are one tensor's names in two programs; write it again")
        theirs[ours] = name
    return ours_by_name


def _published_module(module: str, published: Mapping[str, str], flat: Mapping[str, str]) -> str | None:
    if not (prefix := _FLAT_PREFIX.match(module)):
        return rename(module, published) or module
    # Underscores stand for dots or for themselves: only the family's own names tell which.
    rest = module[prefix.end() :]
    renamed = flat.get(_FLAT_BLOCK.sub("{n}", rest))
    return renamed and renamed.format(n="".join(_FLAT_BLOCK.findall(rest)))


def modules_of(tensors: Iterable[str]) -> list[str]:
    """The modules that tensors of our names update, once each, in order."""
    return list(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in tensors))


def listed(names: list[str]) -> str:
    """Some names for a message and how many more there are, those that differ by their numbers alone once."""
    kinds = {re.sub(r"\d+", "0", name): name for name in reversed(names)}
    some = [short(name) for name in reversed(list(kinds.values()))][:_MOST_LISTED]
    rest = len(names) - len(some)
    return ", ".join(some) + (f" and {rest} more" if rest else "")
