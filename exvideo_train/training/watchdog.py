"""A rank that dies or hangs brings the job down, with a message that names it.

Each rank's main thread counts its progress with :meth:`Watchdog.beat`; a side thread publishes the count in the process
group's key-value store and reads the others'. When this rank's own progress stands still for the time-out, the rank
that is furthest behind is named and the process ends, which makes the launcher end the others. A rank whose side thread
is silent has died.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

# Not RESUME_STATUS: a job that hangs may hang again, so that requeueing it is for a person or a script to decide.
WATCHDOG_STATUS = 74
_PUBLISH_SECONDS = 1.0
# Five messages that did not come.
_SILENCE_SECONDS = 5.0


class Watchdog:
    """Context that ends the process when the job stands still.

    Args:
        rank, world_size: of the job.
        timeout_seconds: time without progress after which the job is brought down; 0 turns the watchdog off.
    """

    def __init__(self, rank: int, world_size: int, timeout_seconds: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self._count = 0
        self._phase = "start"
        self._started = self._changed = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # Another rank's last message and when it changed, by this rank's clock: clocks of machines differ.
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}

    def __enter__(self) -> Watchdog:
        if self.timeout_seconds > 0 and self.world_size > 1:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaving without an error, all ranks must have met at a barrier: rank 0 holds the store."""
        if self._thread is not None and kind is not None and issubclass(kind, RuntimeError):
            self._blame_silent_ranks(error)
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, phase: str) -> None:
        """The main thread begins ``phase``: progress."""
        self._count += 1
        self._phase = phase
        self._changed = time.monotonic()

    def _watch(self) -> None:
        store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store()).clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=max(5.0, self.timeout_seconds / 4)))
        tick = 0
        while not self._stop.wait(min(_PUBLISH_SECONDS, self.timeout_seconds / 5)):
            tick += 1
            try:
                message = {"tick": tick, "count": self._count, "phase": self._phase, "host": socket.gethostname()}
                store.set(f"rank_{self.rank}", json.dumps(message))
                self._read_others(store)
            except (RuntimeError, dist.DistError) as error:
                if self._stop.is_set():
                    return
                reason = str(error).split("\n")[0]
                self._end(f"rank 0 no longer answers (it holds the job's key-value store): {reason}")
            silent = self._silent_ranks(self.timeout_seconds)
            if silent:
                self._end(f"{_names(silent)} died: silent for {self.timeout_seconds:g} s")
            if time.monotonic() - self._changed > self.timeout_seconds:
                self._end(self._explain_hang())

    def _silent_ranks(self, seconds: float) -> list[int]:
        """Other ranks whose side thread has said nothing for so long: a hanging main thread does not silence it."""
        now = time.monotonic()
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        return [rank for rank in others if now - self._seen.get(rank, ({}, self._started))[1] > seconds]

    def _blame_silent_ranks(self, error: BaseException | None) -> None:
        """A collective that fails most often means that another rank has died: wait until its silence shows."""
        patience = min(_SILENCE_SECONDS, self.timeout_seconds)
        deadline = time.monotonic() + 2 * patience
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if silent := self._silent_ranks(patience):
                reason = str(error).split("\n")[0]
                self._end(f"{_names(silent)} died, seen here as: {reason}")

    def _read_others(self, store: Any) -> None:
        for other in range(self.world_size):
            key = f"rank_{other}"
            if other == self.rank or not store.check([key]):
                continue
            message = json.loads(store.get(key))
            if other not in self._seen or self._seen[other][0]["tick"] != message["tick"]:
                self._seen[other] = message, time.monotonic()

    def _explain_hang(self) -> str:
        counts = {self.rank: (self._count, self._phase, socket.gethostname())}
        counts |= {other: (m["count"], m["phase"], m["host"]) for other, (m, _) in self._seen.items()}
        behind = min(count for count, _, _ in counts.values())
        culprits = [rank for rank, (count, _, _) in counts.items() if count == behind]
        if len(culprits) == len(counts):
            where = f"all ranks stand in {self._phase!r}"
        else:
            where = ", ".join(f"rank {r} on {counts[r][2]} in {counts[r][1]!r}" for r in sorted(culprits))
            where = f"furthest behind: {where}"
        return f"no progress for {self.timeout_seconds:g} s; {where}"

    def _end(self, message: str) -> None:
        print(
            f"error: rank {self.rank} ends the job: {message} (safety.rank_timeout_seconds={self.timeout_seconds:g}). "
            "The last checkpoint is intact; the same command resumes.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(WATCHDOG_STATUS)


def _names(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
