"""Some hundred cases of each target, the same in every run; and that the fuzzing itself notices what it should."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import pytest

from exvideo_train.errors import UserError
from fuzz.mutations import Mutator
from fuzz.running import Case, Rows, Target, run_target
from fuzz.targets import ALL

NUM_CASES = 250


@pytest.mark.parametrize("target", ALL, ids=[target.name for target in ALL])
def test_no_case_ends_otherwise_than_declared(target: Target) -> None:
    tally = run_target(target, 0, range(NUM_CASES))
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.cases == NUM_CASES
    # Mutations that all end alike would say little.
    assert tally.kept
    assert tally.dropped or tally.refused or target.name in ("captioned_folder", "captions")


def _raises(error: Exception) -> Case:
    def case(_: Mutator) -> Rows:
        raise error

    return case


def _never_ends(_: Mutator) -> Rows:
    while True:
        pass


def _takes_memory(_: Mutator) -> Rows:
    bytearray(b"x") * (80 << 20)
    return Rows()


def _takes_all_memory(_: Mutator) -> Rows:
    bytearray(1 << 40)
    return Rows()


def _warns(_: Mutator) -> Rows:
    warnings.warn("of a stranger's text", SyntaxWarning, stacklevel=1)
    return Rows()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (_raises(KeyError("caption")), "KeyError: 'caption'"),
        (_raises(UserError("")), "a refusal says why"),
        (_raises(UserError("x" * 10_000)), "a message of 10,000 letters"),
        (_never_ends, "not ended after"),
        (_takes_memory, "MiB of memory"),
        (_takes_all_memory, "MemoryError"),
        (_warns, "it warns: of a stranger's text"),
    ],
    ids=["an exception", "no message", "a long message", "no end", "memory", "all memory", "a warning"],
)
def test_failures_are_noticed_and_can_be_repeated(case: Case, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.running.MAX_CASE_SECONDS", 0.2)
    monkeypatch.setattr("fuzz.running.MAX_CASE_BYTES", 32 << 20)
    begun = time.process_time()
    tally = run_target(Target("it", (UserError,), lambda _: case, 1), 3, [7])
    assert tally.failures[0].startswith("target=it seed=3 case=7\n")
    assert says in tally.failures[0]
    assert time.process_time() - begun < 5


def test_a_case_depends_on_its_seed_and_number_alone() -> None:
    seen: list[bytes] = []

    def prepare(_: object) -> Callable[[Mutator], Rows]:
        return lambda mutator: Rows(len(seen.append(mutator.json({"a": [1, "b"]})) or seen))

    target = Target("it", (UserError,), prepare, 1)
    for seed, numbers in ((1, [1, 2, 3]), (1, [3]), (2, [3])):
        run_target(target, seed, numbers)
    assert seen[2] == seen[3] != seen[4]
    assert len(set(seen)) == 4
