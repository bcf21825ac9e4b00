"""Schemas of the JSON in a latent store: what a field may hold, said in the words that its error uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from exvideo_train.errors import UserError
from exvideo_train.files import short


@dataclass(frozen=True)
class Kind:
    """Values that a field may have, and their name in "must be ..."."""

    words: str
    accepts: Callable[[Any], bool]


def _number(least: float, most: float) -> Callable[[Any], bool]:
    # True is an int too; NaN compares with nothing; an int of any length compares without becoming a float.
    return lambda value: type(value) in (int, float) and least <= value <= most


def _count(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 1 << 53


def _matches(pattern: str) -> Callable[[Any], bool]:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


TEXT = Kind("text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number from 0 to 2**53", _count(0))
POSITIVE_COUNT = Kind("a whole number from 1 to 2**53", _count(1))
YES_OR_NO = Kind("true or false", lambda value: isinstance(value, bool))
RATE = Kind("a number of frames a second from 1e-6 to 1e6", _number(1e-6, 1e6))
SHA256 = Kind("a sha256 in 64 hex digits", _matches("[0-9a-f]{64}"))
# It becomes a file name: nothing that could lead out of a folder.
CLIP_ID = Kind("3 to 200 letters, digits, - or _", _matches("[A-Za-z0-9_-]{3,200}"))
DTYPE = Kind("bf16, fp16 or fp32", lambda value: value in ("bf16", "fp16", "fp32"))
# Those of published VAEs lie between 0.1 and 2; far outside float32 latents would be all zeros or infinite.
SCALING_FACTOR = Kind("a number from 1e-6 to 1e6", _number(1e-6, 1e6))


def check_fields(
    content: Any, kinds: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None, others: bool = True
) -> dict[str, Any]:
    """A JSON object whose fields are what they should be; optional ones may be null, which is to be absent.

    Args:
        others: whether it may have other fields, which are left as they are.

    Raises:
        ValueError: it is no object, or names the field that is missing, unknown or has another value.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{short(content)} is no JSON object")
    for name, kind in kinds.items():
        if name not in content:
            raise ValueError(f"{name} is missing")
        check_value(name, content[name], kind)
    present = {name: value for name, value in content.items() if value is not None or name in kinds}
    for name, kind in (optional or {}).items():
        if name in present:
            check_value(name, present[name], kind)
    if not others and len(present) > len(kinds):
        unknown = sorted(set(present) - set(kinds) - set(optional or ()))
        if unknown:
            raise ValueError(f"{', '.join(map(short, unknown[:5]))}: unknown field")
    return present


def check_value(name: str, value: Any, kind: Kind) -> None:
    """Check one value.

    Raises:
        ValueError: it is of another kind; the message has its name and the value.
    """
    if not kind.accepts(value):
        raise ValueError(f"{name}={short(value)}: must be {kind.words}")


def check_scaling_factor(value: Any, where: object) -> float:
    """The factor between a VAE's latents and the network's, from ``where`` as errors name it.

    Raises:
        UserError: it would make all latents zero, infinite, of the other sign or not a number.
    """
    try:
        check_value("scaling_factor", value, SCALING_FACTOR)
    except ValueError as error:
        raise UserError(f"{where}: {error}; fetch the model or the store again") from None
    return float(value)
