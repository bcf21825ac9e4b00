"""An ordered parallel map whose workers may hang or die without stopping it.

Video decoders leak, hang and crash; each worker process is therefore watched, killed when its task takes too long,
and replaced after a number of tasks. A broken pipe, not a lock, tells of a death, so nothing can stay locked.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar, cast

from exvideo_train.clips.container import Reason
from exvideo_train.clips.opening import bound_memory
from exvideo_train.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failed:
    """What a worker's hang or death gives in place of a result; `reason` is a word of `Reason`."""

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
) -> Iterator[tuple[Task, Result | Failed]]:
    """Apply `function` to every task in worker processes; (task, result) pairs come in the order of the tasks.

    Args:
        function: importable by name (or a partial of such); must not import torch at module level if workers are to
            start quickly.
        tasks: read as workers become free.
        num_workers: processes, 0 for one a core.
        timeout_seconds: a task that takes longer has its worker killed and gives ``Failed``.
        tasks_per_worker: a worker is replaced after so many.
        ahead_per_worker: tasks that may be begun or finished ahead of the oldest unfinished one, for each worker;
            bounds the memory while one task is slow.

    Raises:
        UserError: raised by `function` in a worker. RuntimeError: any other error there, with its traceback.
    """
    workers = num_workers or num_cores()
    pool = _Pool(function, workers, timeout_seconds, tasks_per_worker, workers * ahead_per_worker)
    try:
        yield from pool.run(iter(tasks))
    finally:
        pool.close()


class _Worker(Generic[Task]):
    def __init__(self, function: Callable[[Task], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        # A fresh worker imports first and says so; only then does a task's clock begin.
        self.ready = False
        self.served = 0
        self.number: int | None = None
        self.task: Task | None = None
        self.deadline = 0.0

    def close(self) -> None:
        """End the process: at once while it has a task or is still starting, else when it finds the pipe closed."""
        if not self.ready or self.number is not None:
            self.process.kill()
        self.connection.close()
        self.process.join(timeout=1.0)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


class _Pool(Generic[Task, Result]):
    def __init__(
        self,
        function: Callable[[Task], Result],
        num_workers: int,
        timeout_seconds: float,
        tasks_per_worker: int,
        window: int,
    ) -> None:
        self._function = function
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._tasks_per_worker = tasks_per_worker
        self._window = window
        self._pending: deque[Task] = deque()
        self._workers: list[_Worker[Task]] = []
        self._finished: dict[int, tuple[Task, Result | Failed]] = {}
        self._started = 0
        self._emitted = 0
        self._exhausted = False

    def run(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result | Failed]]:
        while True:
            self._hand_out(tasks)
            if self._emitted in self._finished:
                # What is taken away makes room for tasks, so hand out again before waiting for anybody.
                yield self._finished.pop(self._emitted)
                self._emitted += 1
            elif self._exhausted and not self._pending and self._emitted == self._started:
                return
            else:
                self._collect()

    def _hand_out(self, tasks: Iterator[Task]) -> None:
        while not self._exhausted and self._started + len(self._pending) - self._emitted < self._window:
            if len(self._pending) >= self._num_workers:
                break
            try:
                self._pending.append(next(tasks))
            except StopIteration:
                self._exhausted = True
        for worker in self._workers:
            if self._pending and worker.ready and worker.number is None:
                self._begin(worker, self._pending.popleft())
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self._num_workers and starting < len(self._pending):
            self._workers.append(_Worker(self._function))
            starting += 1

    def _begin(self, worker: _Worker[Task], task: Task) -> None:
        worker.number, worker.task = self._started, task
        worker.deadline = time.monotonic() + self._timeout_seconds
        self._started += 1
        # If it died between tasks, `_receive` will find the broken pipe and say so.
        with contextlib.suppress(ConnectionError):
            worker.connection.send(task)

    def _collect(self) -> None:
        busy = {worker.connection: worker for worker in self._workers if worker.number is not None or not worker.ready}
        assert busy, "waiting for nobody"
        deadlines = [worker.deadline for worker in busy.values() if worker.ready]
        patience = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for connection in wait(list(busy), timeout=patience):
            assert isinstance(connection, Connection)
            self._receive(busy[connection])
        now = time.monotonic()
        for worker in [entry for entry in self._workers if entry.number is not None and entry.deadline <= now]:
            if not worker.connection.poll():
                detail = f"took longer than {self._timeout_seconds:g} s"
                worker.process.kill()
                self._finish(worker, Failed(Reason.TIMEOUT.value, detail))
                self._retire(worker)

    def _receive(self, worker: _Worker[Task]) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            if worker.number is None:
                raise RuntimeError(f"a worker process did not start (exit code {worker.process.exitcode})") from None
            detail = f"its process ended with exit code {worker.process.exitcode}"
            self._finish(worker, Failed(Reason.WORKER_DIED.value, detail))
            self._retire(worker)
            return
        if kind == "ready":
            worker.ready = True
        elif kind == "user_error":
            raise UserError(value)
        elif kind == "error":
            raise RuntimeError(f"in a worker process:\n{value}")
        else:
            self._finish(worker, value)
            if worker.served >= self._tasks_per_worker:
                self._retire(worker)

    def _finish(self, worker: _Worker[Task], result: Result | Failed) -> None:
        assert worker.number is not None
        # A task may itself be None, so the number alone says whether the worker has one.
        self._finished[worker.number] = (cast(Task, worker.task), result)
        worker.number = worker.task = None
        worker.served += 1

    def _retire(self, worker: _Worker[Task]) -> None:
        self._workers.remove(worker)
        worker.close()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Main function of a worker: tasks in, results out, until the pipe closes or Ctrl-C."""
    _exit_with_parent()
    bound_memory()
    # The pipe may close at any moment, while this process is still starting too: then nobody wants anything of it.
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        connection.send(("ready", None))
        while True:
            connection.send(_answer(function, connection.recv()))


def _answer(function: Callable[[Any], Any], task: Any) -> tuple[str, Any]:
    try:
        return "result", function(task)
    except UserError as error:
        return "user_error", str(error)
    # Whatever else goes wrong is a bug and is raised, with its traceback, in the parent.
    except Exception:  # noqa: BLE001
        return "error", traceback.format_exc()


def _exit_with_parent() -> None:
    """End this process when its parent is gone, even by kill -9."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
