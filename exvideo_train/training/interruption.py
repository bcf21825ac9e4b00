"""Being asked to stop: SIGTERM, SIGINT, or a wall-clock limit. The step is finished, a checkpoint saved, and the exit
status says "resume me"."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType

# EX_TEMPFAIL of sysexits.h: the same command later goes on.
RESUME_STATUS = 75
# A terminal sends Ctrl-C to every process and the launcher adds its own SIGTERM within moments: one request, not two.
SAME_REQUEST_SECONDS = 2.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Context in which the first signal is a request and a second one, later, ends the process at once.

    Args:
        time_limit_minutes: wall-clock minutes after which a stop is requested; 0 for none.
    """

    def __init__(self, time_limit_minutes: float = 0.0) -> None:
        self._deadline = time.monotonic() + 60 * time_limit_minutes if time_limit_minutes else None
        self._requested_at: float | None = None
        self._reason = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is not None and now - self._requested_at > SAME_REQUEST_SECONDS:
            os.write(2, b"second signal: exiting at once; the last checkpoint is intact\n")
            os._exit(128 + number)
        if self._requested_at is None:
            self._requested_at = now
            self._reason = signal.Signals(number).name
            os.write(2, f"{self._reason}: finishing the step, saving, then exiting (again: at once)\n".encode())

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._reason = self._reason or "time limit"
            return True
        return self._requested_at is not None

    @property
    def reason(self) -> str:
        return self._reason or "another rank was asked to stop"


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Signals that come inside take effect afterwards; processes started inside are born with them blocked."""
    # Python's tracker of shared memory unblocks signals when it is first started, up to 3.12.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_only_the_parent() -> None:
    """In a process born with stop signals blocked: end at SIGTERM from the process that started it, and no other.

    A terminal and the DeepSpeed launcher signal every process of a job. A reader of data that died of it would take
    the rank with it before that has finished its step.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where readers are ended by their parent's death alone
        threading.Thread(target=_wait_for_the_parent, daemon=True).start()


def _wait_for_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
