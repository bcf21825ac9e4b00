"""Ending a long command from outside: Ctrl-C, or the SIGTERM of schedulers and `kill`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# What shells give to a program that Ctrl-C has ended.
INTERRUPTED_STATUS = 130


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends what runs within as Ctrl-C does: by KeyboardInterrupt, so that everything is tidied up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
