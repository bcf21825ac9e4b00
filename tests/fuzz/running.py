"""Cases of a target one after another, each bounded in time and memory, with what came of them.

A case is one mutated example through one reader. It ends in rows that are kept or dropped, or is refused by one of the
exceptions that the reader declares; anything else is a failure. A case's chance depends on the seed, the target's name
and the case's number alone.
"""

from __future__ import annotations

import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from fuzz.mutations import Mutator

MAX_CASE_SECONDS = 3.0
"""Of processor time."""
MAX_CASE_BYTES = 256 << 20
"""By which a case may raise the process's peak of memory."""
_MAX_DATA_BYTES = 6 << 30
_MAX_MESSAGE_LETTERS = 4000


@dataclass(frozen=True)
class Rows:
    """What a case that was not refused came to."""

    kept: int = 0
    dropped: int = 0


Case = Callable[[Mutator], Rows]


@dataclass(frozen=True)
class Target:
    """A reader under attack.

    Attributes:
        name: also seeds its cases.
        declared: what it may raise.
        prepare: makes a function that runs one case; given a folder of the target's own.
        cases: in a full run.
    """

    name: str
    declared: tuple[type[Exception], ...]
    prepare: Callable[[Path], Case]
    cases: int


@dataclass
class Tally:
    """What came of a target's cases; the fields are the table's columns."""

    target: str
    cases: int = 0
    seconds: float = 0.0
    kept: int = 0
    dropped: int = 0
    refused: int = 0
    slowest_ms: float = 0.0
    memory_mib: float = 0.0
    failures: list[str] = field(default_factory=list)


def run_target(target: Target, seed: int, numbers: Iterable[int], most_failures: int = 20) -> Tally:
    """Run cases of a target; each failure is a text that begins with how to repeat it."""
    tally = Tally(target.name)
    with tempfile.TemporaryDirectory() as folder, _bounds(), warnings.catch_warnings(record=True) as warned:
        case = target.prepare(Path(folder))
        # What strangers write must not speak to the user by way of Python's warnings.
        warnings.simplefilter("always")
        warned.clear()
        _forget_peak()
        begun, memory = time.process_time(), _peak_bytes()
        for number in numbers:
            try:
                _run_case(target, case, Mutator(Random(f"{seed} {target.name} {number}")), tally)
                assert not warned, f"it warns: {warned.pop().message}"
            except Exception as error:  # noqa: BLE001 (any is a finding)
                where = "".join(traceback.format_exception(error, limit=-4))
                tally.failures.append(f"target={target.name} seed={seed} case={number}\n{where}")
                if len(tally.failures) == most_failures:
                    break
        tally.seconds = time.process_time() - begun
        tally.memory_mib = (_peak_bytes() - memory) / 2**20
    return tally


def _run_case(target: Target, case: Case, mutator: Mutator, tally: Tally) -> None:
    tally.cases += 1
    memory, begun = _peak_bytes(), time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CASE_SECONDS)
    try:
        rows = case(mutator)
    except target.declared as refusal:
        tally.refused += 1
        message = str(refusal)
        assert message, "a refusal says why"
        assert len(message) <= _MAX_MESSAGE_LETTERS, f"a message of {len(message):,} letters: {message[:200]}..."
    else:
        tally.kept += rows.kept
        tally.dropped += rows.dropped
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    seconds, grown = time.process_time() - begun, _peak_bytes() - memory
    tally.slowest_ms = max(tally.slowest_ms, seconds * 1000)
    assert grown <= MAX_CASE_BYTES, f"{grown >> 20} MiB of memory"
    assert seconds <= MAX_CASE_SECONDS, f"{seconds:.1f} s of processor time"


def _forget_peak() -> None:
    """Begin the peak of memory anew: what other work has taken before would hide what a case takes."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def _bounds() -> Iterator[None]:
    """A case that does not end is ended, and what asks for too much memory is refused it."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"not ended after {MAX_CASE_SECONDS:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _MAX_DATA_BYTES if hard == resource.RLIM_INFINITY else min(_MAX_DATA_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)
