"""Attacks as data: a name, what is given to the project, and the one ending that is right.

A new case is one line in a table of ``tests/attacks/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest

from exvideo_train.errors import UserError


class Ending(Enum):
    """How an attack must end; anything else, a traceback above all, is a defect."""

    HELD = "held"
    """It is read as what it is, and nothing else comes of it."""
    DROPPED = "dropped"
    """It costs itself alone: counted and listed with its reason, and its neighbours are kept."""
    REFUSED = "refused"
    """The command ends with a UserError that names the file or field."""


@dataclass(frozen=True)
class Attack:
    """One case.

    Attributes:
        name: shown as the test's name.
        content: what is attacked with, in the form that the table's test wants: text, bytes, a function that writes.
        ending: how it must end.
        says: words of the reason (dropped) or of the message (refused), each of which must be there.
    """

    name: str
    content: Any
    ending: Ending
    says: Sequence[str] = ()


def held(name: str, content: Any) -> Attack:
    """A case that must do no harm."""
    return Attack(name, content, Ending.HELD)


def dropped(name: str, content: Any, *says: str) -> Attack:
    """A case that costs one row, member or file; ``says`` begins with the reason's word."""
    return Attack(name, content, Ending.DROPPED, says)


def refused(name: str, content: Any, *says: str) -> Attack:
    """A case that ends the command with a message."""
    return Attack(name, content, Ending.REFUSED, says)


def attacks(cases: Iterable[Attack]) -> pytest.MarkDecorator:
    """Parametrise a test's argument ``attack`` with a table."""
    return pytest.mark.parametrize("attack", [pytest.param(case, id=case.name) for case in cases])


def check_ending(attack: Attack, run: Callable[[], Mapping[str, str]]) -> None:
    """Run the attacked code and hold its ending against the case.

    Args:
        run: returns what was dropped, with the reason and its detail; raises what the code raises.
    """
    if attack.ending is Ending.REFUSED:
        with pytest.raises(UserError) as refusal:
            run()
        _check_words(attack, str(refusal.value))
        return
    drops = run()
    if attack.ending is Ending.HELD:
        assert not drops
    else:
        assert len(drops) == 1, f"one must be dropped, not {dict(drops)}"
        _check_words(attack, " ".join(drops.values()))


def _check_words(attack: Attack, text: str) -> None:
    missing = [word for word in attack.says if word not in text]
    assert not missing, f"{missing} not said in: {text}"
