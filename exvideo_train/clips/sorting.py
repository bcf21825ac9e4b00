"""Sorting more lines than memory holds: sorted runs on disk, merged as they are read."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

# Files open at once in a merge; systems commonly allow 1024 to a process.
_FAN_IN = 256


def write_run(path: Path, lines: list[str]) -> None:
    """Sort `lines` (each ending in a newline) in place by code point and write them."""
    lines.sort()
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
        stream.writelines(lines)


def merge_runs(runs: list[Path], folder: Path) -> Iterator[str]:
    """All lines of the sorted runs in order; `folder` takes intermediate runs when there are too many to open."""
    level = 0
    while len(runs) > _FAN_IN:
        merged: list[Path] = []
        for start in range(0, len(runs), _FAN_IN):
            merged.append(folder / f"merge-{level}-{start:09d}")
            with open(merged[-1], "w", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
                stream.writelines(_merge(runs[start : start + _FAN_IN]))
        runs = merged
        level += 1
    yield from _merge(runs)


def _merge(runs: Iterable[Path]) -> Iterator[str]:
    with ExitStack() as stack:
        streams = [
            stack.enter_context(open(path, encoding="utf-8", errors="surrogateescape", newline="\n")) for path in runs
        ]
        yield from heapq.merge(*streams)
