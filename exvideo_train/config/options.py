"""What a number among the options may be: said in its type, and checked when its group is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, get_origin, get_type_hints

from exvideo_train.errors import UserError


@dataclass(frozen=True)
class Range:
    """Both ends belong to it, but for ``above`` and ``below``.

    Attributes:
        advice: what a user may take instead, for the message.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    advice: str = ""

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.most):
            words = f"from {self.least:g} to {self.most:g}"
        else:
            ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
            words = " and ".join(f"{word} {end:g}" for word, end in ends.items() if math.isfinite(end))
        return f"{words}; {self.advice}" if self.advice else words


class Options:
    """A group of options; ``Annotated[int, Range(...)]`` is what one may be, of a list what each number may be.

    Raises:
        UserError: a number outside its range; names the option, its value and the range.
    """

    _prefix = ""

    def __init_subclass__(cls, group: str = "") -> None:
        """``group`` is its name in an experiment; commands have none."""
        cls._prefix = f"{group}." if group else ""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            if get_origin(kind) is not Annotated:
                continue
            (limits,), value = kind.__metadata__, getattr(self, name)
            numbers = value if isinstance(value, list) else [value]
            if not all(number is None or number in limits for number in numbers):
                raise UserError(f"{self._prefix}{name}={value}: must be {limits}")
