"""Decoding ahead of the encoder, in processes that may die or hang without taking anything with them.

Each worker process is watched by one thread of the parent. They talk through a pipe of their own: a process killed
at any moment can neither hold a lock that others need nor leave shared memory behind.
Axis letters: C channel, F video frames, H height, W width.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from exvideo_train.clips.opening import bound_memory
from exvideo_train.clips.record import ClipRecord
from exvideo_train.geometry import Geometry

if TYPE_CHECKING:
    from torch import Tensor

STARTUP_SECONDS = 300.0
# One more try when a worker dies: the system's out-of-memory killer picks processes whatever they were reading.
ATTEMPTS_AFTER_DEATH = 2
ATTEMPTS_TO_START = 3


@dataclass(frozen=True)
class Failure:
    """Why a clip could not be encoded; ``reason`` is a stable word, ``detail`` is for a person."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Decoded:
    """A clip's frames, uint8 (F, H, W, C), or the failure.

    Attributes:
        decord_refusal: why PyAV read the clip although decord was to, None if it did not.
    """

    record: ClipRecord
    frames_FHWC: Tensor | None
    failure: Failure | None
    seconds: float
    decord_refusal: str | None = None


@dataclass(frozen=True)
class DecodeOptions:
    """How a worker decodes.

    Attributes:
        timeout_seconds: wall-clock time a clip may take before its worker is killed.
        recycle_after: clips after which a worker is replaced, so that a decoder's leaks cannot grow.
        decoder: ``decord``, with PyAV for what it cannot be given, or ``pyav``.
    """

    geometry: Geometry
    timeout_seconds: float
    recycle_after: int
    decoder: str = "decord"


def exit_with_parent() -> None:
    """End this process when its parent is gone, even by kill -9: nothing may go on writing behind a new run."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _serve(connection: Connection, geometry: Geometry, decoder: str) -> None:
    """Main function of a worker: records in, frames or failures out, until the pipe closes."""
    exit_with_parent()
    bound_memory()
    # Before the first clip's time begins to run: on a busy machine these take longer than a clip.
    import av  # noqa: F401
    import torch

    from exvideo_train.clips.container import UnreadableClip
    from exvideo_train.clips.decord_frames import load_decord
    from exvideo_train.clips.reader import read_clip

    torch.set_num_threads(1)
    if decoder == "decord":
        load_decord()
    connection.send("ready")
    while True:
        try:
            record = connection.recv()
        except EOFError:
            return
        try:
            frames_FHWC, decord_refusal = read_clip(record, geometry, num_threads=1, decoder=decoder)
        except UnreadableClip as error:
            connection.send(Failure(error.reason, error.detail))
        # Any error that reading one clip raises is that clip's failure and ends up in the report.
        except Exception as error:  # noqa: BLE001
            connection.send(Failure("decoder_error", f"{type(error).__name__}: {error}"))
        else:
            connection.send(decord_refusal)
            connection.send_bytes(frames_FHWC.numpy().data.cast("B"))


class DecodeWorker:
    """One decoding process, replaced when it dies, hangs or has served its time."""

    def __init__(self, options: DecodeOptions) -> None:
        self.options = options
        self._process: Any = None
        self._connection: Connection | None = None
        self._num_served = 0

    def decode(self, record: ClipRecord) -> Decoded:
        """Frames of one clip, or why not; never raises for what a clip does."""
        began = time.monotonic()
        for _ in range(ATTEMPTS_AFTER_DEATH):
            self._ensure_started()
            decoded = self._attempt(record, began)
            if decoded.failure is None or decoded.failure.reason != "worker_died":
                break
        return decoded

    def _ensure_started(self) -> None:
        if self._process is not None and self._num_served >= self.options.recycle_after:
            self.close()
        if self._process is not None:
            return
        for _ in range(ATTEMPTS_TO_START):
            if self._start():
                return
            code = self.close()
        raise RuntimeError(f"decoding processes do not start (exit code {code})")

    def _start(self) -> bool:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self.options.geometry, self.options.decoder), daemon=True
        )
        self._process.start()
        theirs.close()
        self._num_served = 0
        try:
            with _Deadline(self._process, STARTUP_SECONDS):
                self._connection.recv()
        except (EOFError, OSError):
            return False
        return True

    def _attempt(self, record: ClipRecord, began: float) -> Decoded:
        import torch

        def failed(failure: Failure) -> Decoded:
            return Decoded(record, None, failure, time.monotonic() - began)

        assert self._connection is not None
        geometry = self.options.geometry
        deadline = _Deadline(self._process, self.options.timeout_seconds)
        try:
            with deadline:
                self._connection.send(record)
                answer: Failure | str | None = self._connection.recv()
                self._num_served += 1
                if isinstance(answer, Failure):
                    return failed(answer)
                frames_FHWC = torch.empty((geometry.num_frames, geometry.height, geometry.width, 3), dtype=torch.uint8)
                self._connection.recv_bytes_into(frames_FHWC.numpy().data.cast("B"))
                return Decoded(record, frames_FHWC, None, time.monotonic() - began, decord_refusal=answer)
        except (EOFError, OSError):
            code = self.close()
            if deadline.expired:
                return failed(Failure("timeout", f"decoding took longer than {self.options.timeout_seconds:g} s"))
            return failed(Failure("worker_died", f"the decoder killed its process (exit code {code})"))

    def close(self) -> int | None:
        """End the process; returns its exit code."""
        if self._process is None:
            return None
        assert self._connection is not None
        self._connection.close()
        # A worker between clips ends when its pipe closes; one that hangs or was given up is killed.
        self._process.join(timeout=0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code: int | None = self._process.exitcode
        # Its deadlines' timers hold it in a circle: without this, two descriptors stay open a process.
        self._process.close()
        self._process = None
        return code


class _Deadline:
    """Kills a process when the ``with`` block takes too long; its pipe then ends whatever waits on it."""

    def __init__(self, process: Any, seconds: float) -> None:
        self.expired = False
        self._process = process
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def _expire(self) -> None:
        self.expired = True
        self._process.kill()

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        # One that has just expired still needs the process.
        self._timer.join()


class DecodePool:
    """Several workers that decode a stream of clips ahead of whoever consumes it.

    Args:
        options: how a worker decodes.
        num_workers: processes.
        prefetch: decoded clips that may wait; with those in work they bound the memory.
    """

    def __init__(self, options: DecodeOptions, num_workers: int, prefetch: int) -> None:
        self._num_workers = num_workers
        self._options = options
        self._results: queue.Queue[Decoded | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def decode(self, records: Iterable[ClipRecord]) -> Iterator[Decoded]:
        """Decoded clips as they become ready, in no particular order."""
        source = iter(records)

        def take() -> ClipRecord | None:
            with self._lock:
                return next(source, None)

        self._threads = [
            threading.Thread(target=self._work, args=(take,), daemon=True) for _ in range(self._num_workers)
        ]
        for thread in self._threads:
            thread.start()
        running = len(self._threads)
        try:
            while running:
                result = self._results.get()
                if result is None:
                    running -= 1
                elif isinstance(result, BaseException):
                    raise result
                else:
                    yield result
        finally:
            self._stopped.set()

    def _work(self, take: Callable[[], ClipRecord | None]) -> None:
        worker = DecodeWorker(self._options)
        try:
            while not self._stopped.is_set() and (record := take()) is not None:
                self._put(worker.decode(record))
            self._put(None)
        # Nothing may be lost in a thread: the consumer raises it.
        except BaseException as error:  # noqa: BLE001
            self._put(error)
        finally:
            worker.close()

    def _put(self, result: Decoded | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                self._results.put(result, timeout=0.2)
                return
            except queue.Full:
                continue
