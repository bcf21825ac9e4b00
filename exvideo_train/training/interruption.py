"""Being asked to stop: SIGTERM, SIGINT, a wall-clock limit, or the launcher's death. The step is finished, a checkpoint
saved, and the exit status says "resume me"."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import psutil

# EX_TEMPFAIL of sysexits.h: the same command later goes on.
RESUME_STATUS = 75
# A terminal sends Ctrl-C to every process and the launcher adds its own SIGTERM within moments: one request, not two.
SAME_REQUEST_SECONDS = 2.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Commands and modules that start ranks, wait for them and are what a person or a scheduler kills. Slurm ends the ranks
# of srun by itself; a shell may go while its job stays (nohup).
LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}
LAUNCHERS |= {"torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"}
LOOK_SECONDS = 1.0


class Interruption:
    """Context in which the first signal is a request and a second one, later, ends the process at once.

    A launcher that dies without a word (kill -9, out of memory) is a request too: ranks that nobody started any more
    would train for ever, unseen, and in the way of the next start.

    Args:
        time_limit_minutes: wall-clock minutes after which a stop is requested; 0 for none.
    """

    def __init__(self, time_limit_minutes: float = 0.0) -> None:
        self._deadline = time.monotonic() + 60 * time_limit_minutes if time_limit_minutes else None
        self._signalled_at: float | None = None
        self._reason = ""
        self._previous: dict[int, object] = {}
        self._left = threading.Event()

    def __enter__(self) -> Interruption:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        if launchers := find_launchers():
            threading.Thread(target=self._watch, args=(launchers,), name="launchers", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            self._request(signal.Signals(number).name, " (again: at once)")
        elif now - self._signalled_at > SAME_REQUEST_SECONDS:
            _tell("second signal: exiting at once; the last checkpoint is intact")
            os._exit(128 + number)

    def _watch(self, launchers: list[psutil.Process]) -> None:
        """By asking, not by prctl(PR_SET_PDEATHSIG): that tells of the parent alone, and of a thread of it."""
        while not self._left.wait(LOOK_SECONDS):
            for launcher in launchers:
                if not _runs(launcher):
                    self._request(f"the launcher, process {launcher.pid}, has died")
                    return

    def _request(self, reason: str, remark: str = "") -> None:
        self._reason = self._reason or reason
        _tell(f"{reason}: finishing the step, saving, then exiting{remark}")

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._reason = self._reason or "time limit"
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """Why this rank was asked to stop; empty as long as it was not."""
        return self._reason


@cache
def find_launchers() -> list[psutil.Process]:
    """The launcher that started this process, and its own: `deepspeed` starts one a machine, which starts the ranks.

    To be called as early as possible: one that has died before cannot be found.
    """
    found: list[psutil.Process] = []
    # Another user's process, or one that ends meanwhile: the chain is seen no further.
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            # [python, -u, -m, deepspeed.launcher.launch] or [python, /venv/bin/deepspeed]
            words = [Path(word).name for word in process.cmdline()[:4]]
            if not words or not words[0].startswith("python") or LAUNCHERS.isdisjoint(words[1:]):
                break
            found.append(process)
    return found


def _runs(process: psutil.Process) -> bool:
    try:
        # One that its own parent has not waited for yet is as dead.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _tell(text: str) -> None:
    # From a signal handler: no locks of print's. Of a console that is gone nothing is expected.
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


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


def end_process_after(main: Callable[[], None]) -> NoReturn:
    """Call ``main`` and end the process with its status, as the interpreter would, but without tearing it down.

    A thread of gloo may still be giving back the last collective's tensors, for which it needs the interpreter's lock.
    Asking a dying interpreter for it ends the thread by unwinding C++ that cannot be unwound: SIGABRT, and a run that
    has finished looks like one that crashed.
    """
    status: int | str | None = 1
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:  # noqa: BLE001 (the interpreter, too, prints whatever it was)
        traceback.print_exc()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    # The end of an interpreter in its order: threads, then what was registered (wandb, readers of data), then output.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # A console that is gone.
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
