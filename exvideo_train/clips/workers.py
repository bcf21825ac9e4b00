"""Processes that do tasks, and may hang or die over one without stopping the others.

Video decoders leak, hang and crash; so each works in a process that is killed when a task takes too long, and replaced
after a number of tasks. Parent and process talk through a pipe of their own: a process killed at any moment can neither
hold a lock that others need nor leave shared memory behind.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np

from exvideo_train.clips.container import Reason
from exvideo_train.clips.opening import bound_memory
from exvideo_train.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
SomeWorker = TypeVar("SomeWorker", bound="Worker[Any, Any]")

STARTUP_SECONDS = 300.0
_ATTEMPTS_TO_START = 3


@dataclass(frozen=True)
class Failure:
    """Why a clip, or another task, gives nothing; ``reason`` is a stable word, ``detail`` is for a person."""

    reason: str
    detail: str


def num_cores() -> int:
    """Cores that this process may use, which in a container or a batch job are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_workers: int,
    timeout_seconds: float,
    tasks_per_worker: int = 500,
    ahead_per_worker: int = 32,
) -> Iterator[tuple[Task, Result | Failure]]:
    """Apply `function` to every task in worker processes; (task, result) pairs come in the order of the tasks.

    Args:
        function, timeout_seconds, tasks_per_worker: see `Worker`.
        tasks: read as workers become free.
        num_workers: processes, 0 for one a core.
        ahead_per_worker: tasks that may be begun or finished ahead of the oldest unfinished one, for each worker;
            bounds the memory while one task is slow.

    Raises:
        UserError: raised by `function` in a worker. RuntimeError: any other error there, with its traceback.
    """
    num_workers = num_workers or num_cores()
    make_worker = partial(Worker[Task, Result], function, timeout_seconds, tasks_per_worker)
    return map_by(make_worker, Worker.__call__, tasks, num_workers, num_workers * ahead_per_worker)


def map_by(
    make_worker: Callable[[], SomeWorker],
    do: Callable[[SomeWorker, Task], Result],
    tasks: Iterable[Task],
    num_workers: int,
    most_ahead: int,
    in_order: bool = True,
) -> Iterator[tuple[Task, Result]]:
    """(task, result) pairs of workers that go on while the caller is busy with one.

    Args:
        make_worker: called as often as there are tasks for another worker, up to `num_workers` times.
        do: called in a thread of its own for each worker.
        tasks: read in the caller's thread.
        most_ahead: tasks that may have been read and not yet given back; bounds the memory.
        in_order: of the tasks; else as they are done.

    Raises:
        Whatever `do` raises, as soon as it does.
    """
    crew = _Crew(make_worker, do)
    numbered = enumerate(tasks)
    finished: dict[int, tuple[Task, Result]] = {}
    num_ahead = num_done = num_given = 0

    def read_ahead() -> int:
        """Hand out tasks; returns how many are not given back yet."""
        num_open = num_ahead
        for number, task in islice(numbered, most_ahead - num_open):
            crew.begin(number, task)
            num_open += 1
            if crew.size < min(num_workers, num_open):
                crew.grow()
        return num_open

    try:
        num_ahead = read_ahead()
        while num_ahead:
            while num_given not in finished:
                number, task, result = crew.next_done()
                finished[number if in_order else num_done] = task, result
                num_done += 1
            num_given, num_ahead = num_given + 1, num_ahead - 1
            # Before the caller turns to this result: workers are not to wait for him.
            num_ahead = read_ahead()
            yield finished.pop(num_given - 1)
    finally:
        crew.stop()


class _Crew(Generic[SomeWorker, Task, Result]):
    """Workers, each with a thread that gives it one task after another."""

    def __init__(self, make_worker: Callable[[], SomeWorker], do: Callable[[SomeWorker, Task], Result]) -> None:
        self._make_worker, self._do = make_worker, do
        self._todo: SimpleQueue[tuple[int, Task] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, Task, Result] | BaseException] = SimpleQueue()
        self._running: list[tuple[SomeWorker, threading.Thread]] = []
        self._stopped = threading.Event()

    @property
    def size(self) -> int:
        return len(self._running)

    def grow(self) -> None:
        """Another worker."""
        worker = self._make_worker()
        self._running.append((worker, threading.Thread(target=self._work, args=(worker,), daemon=True)))
        self._running[-1][1].start()

    def begin(self, number: int, task: Task) -> None:
        """Leave a task to the worker that is free first."""
        self._todo.put((number, task))

    def next_done(self) -> tuple[int, Task, Result]:
        """Wait for a task that is done; raises what a worker's raised."""
        outcome = self._done.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def stop(self) -> None:
        """End every worker, and tasks under way."""
        self._stopped.set()
        for worker, _ in self._running:
            worker.cancel()
            self._todo.put(None)
        for _, thread in self._running:
            thread.join()

    def _work(self, worker: SomeWorker) -> None:
        try:
            while (entry := self._todo.get()) is not None and not self._stopped.is_set():
                number, task = entry
                self._done.put((number, task, self._do(worker, task)))
        # Nothing may be lost in a thread: the caller raises it.
        except BaseException as error:  # noqa: BLE001
            self._done.put(error)
        finally:
            worker.close()


class Worker(Generic[Task, Result]):
    """A process that does one task at a time; it is started when a task needs it.

    Args:
        function: importable by name (or a partial of such); must not import torch at module level if processes are to
            start quickly.
        timeout_seconds: a task that takes longer has its process killed and gives a `Failure`.
        tasks_per_process: a process is replaced after so many, so that a decoder's leaks cannot grow.
        attempts: at a task whose process dies of it, the first included.
        prepare: called in a fresh process; only then does its first task's clock begin.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        timeout_seconds: float,
        tasks_per_process: int,
        attempts: int = 1,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._function, self._prepare = function, prepare
        self._timeout_seconds = timeout_seconds
        self._tasks_per_process = tasks_per_process
        self._attempts = attempts
        self._process: Any = None
        self._connection: Connection | None = None
        self._num_done = 0
        self._lock = threading.Lock()
        self._is_cancelled = False

    def __call__(self, task: Task) -> Result | Failure:
        """The task's result, or what a hang or death of its process gives in place of it.

        Raises:
            UserError: the function has raised it. RuntimeError: any other error there, or no process starts.
        """
        for _ in range(self._attempts):
            self._ensure_started()
            result = self._attempt(task)
            if not isinstance(result, Failure) or result.reason != Reason.WORKER_DIED.value:
                break
        return result

    def _ensure_started(self) -> None:
        if self._process is not None and self._num_done >= self._tasks_per_process:
            self._end()
        if self._process is not None:
            return
        for _ in range(_ATTEMPTS_TO_START):
            if self._start():
                return
            code = self._end()
            if self._is_cancelled:
                break
        raise RuntimeError(f"worker processes do not start (exit code {code})")

    def _start(self) -> bool:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._function, self._prepare), daemon=True)
        process.start()
        theirs.close()
        with self._lock:
            self._process, self._num_done = process, 0
            if self._is_cancelled:
                process.kill()
        _set_patience(self._connection, STARTUP_SECONDS)
        try:
            self._connection.recv()
        except (EOFError, OSError):
            return False
        _set_patience(self._connection, self._timeout_seconds)
        return True

    def _attempt(self, task: Task) -> Result | Failure:
        assert self._connection is not None
        try:
            self._connection.send(task)
            kind, value = _receive(self._connection)
        except BlockingIOError:
            self._process.kill()
            self._end()
            return Failure(Reason.TIMEOUT.value, f"took longer than {self._timeout_seconds:g} s")
        except (EOFError, OSError):
            return Failure(Reason.WORKER_DIED.value, f"its process ended with exit code {self._end()}")
        self._num_done += 1
        if kind == "user_error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"in a worker process:\n{value}")
        result: Result = value
        return result

    def cancel(self) -> None:
        """End a task under way at once, from another thread; whoever waits for it gets a `Failure` or an error."""
        with self._lock:
            self._is_cancelled = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end()

    def _end(self) -> int | None:
        """End the process, which finds its pipe closed between tasks; returns its exit code."""
        assert self._connection is not None
        with self._lock:
            process, self._process = self._process, None
        self._connection.close()
        process.join(timeout=1.0)
        if process.is_alive():
            process.kill()
        process.join()
        code: int | None = process.exitcode
        # Not when the collector comes to it: its descriptors would stay open until then.
        process.close()
        return code


def _set_patience(connection: Connection, seconds: float) -> None:
    """Have reading and writing end in BlockingIOError when the other end is silent for so long, within a message too.

    A multiprocessing pipe is a pair of sockets, whose own timeouts need neither timers nor threads.
    """
    duration = struct.pack("ll", int(seconds), max(1, int(seconds % 1 * 1e6)))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, duration)


def _send(connection: Connection, value: object) -> None:
    """Arrays go as they lie in memory: pickled with the rest, a clip's frames would be copied twice more."""
    buffers: list[memoryview] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
    connection.send((content, [buffer.nbytes for buffer in buffers]))
    for buffer in buffers:
        connection.send_bytes(buffer)


def _receive(connection: Connection) -> Any:
    content, sizes = connection.recv()
    buffers = [np.empty(size, np.uint8) for size in sizes]
    for buffer in buffers:
        connection.recv_bytes_into(buffer.data)
    return pickle.loads(content, buffers=buffers)


def _serve(connection: Connection, function: Callable[[Any], Any], prepare: Callable[[], None] | None) -> None:
    """Main function of a process: tasks in, results out, until the pipe closes or Ctrl-C."""
    exit_with_parent()
    bound_memory()
    if prepare is not None:
        prepare()
    # The pipe may close at any moment, while this process is still starting too: then nobody wants anything of it.
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        connection.send("ready")
        while True:
            _send(connection, _answer(function, connection.recv()))


def _answer(function: Callable[[Any], Any], task: Any) -> tuple[str, Any]:
    try:
        return "result", function(task)
    except UserError as error:
        return "user_error", str(error)
    # Whatever else goes wrong is a bug and is raised, with its traceback, in the parent.
    except Exception:  # noqa: BLE001
        return "error", traceback.format_exc()


def exit_with_parent() -> None:
    """End this process when its parent is gone, even by kill -9: nothing may go on writing behind a new run."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
