"""The parallel map: order, hangs, deaths, recycling, errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import psutil
import pytest

from exvideo_train.clips import workers
from exvideo_train.clips.workers import Failure, Worker, map_by, parallel_map
from exvideo_train.errors import UserError


def double(value: int) -> int:
    time.sleep(0.02 * (value % 3))
    return 2 * value


def own_process(_: int) -> int:
    return os.getpid()


def misbehave(value: str) -> str:
    if value == "hang":
        time.sleep(60)
    if value == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if value == "user":
        raise UserError("videos=x is wrong")
    if value == "bug":
        raise KeyError("bug")
    return value


def test_results_come_in_order_of_the_tasks():
    assert list(parallel_map(double, range(40), 2, 60)) == [(value, 2 * value) for value in range(40)]


def first_is_slow(value: int) -> int:
    time.sleep(1.5 if value % 10 == 0 else 0)
    return value


@pytest.mark.timeout(60)
def test_a_slow_task_that_all_others_wait_for_stops_nothing():
    """The others run ahead as far as they may and are idle when it ends."""
    assert [result for _, result in parallel_map(first_is_slow, range(22), 2, 60, ahead_per_worker=2)] == list(
        range(22)
    )


def test_none_is_a_task_and_a_result_like_any_other():
    assert list(parallel_map(print, [None, None], 1, 60)) == [(None, None)] * 2


def test_hangs_and_deaths_cost_their_own_task_only():
    tasks = ["a", "hang", "b", "die", "c", "die", "d"]
    results = dict(enumerate(result for _, result in parallel_map(misbehave, tasks, 2, 1.5)))
    assert [results[index] for index in (0, 2, 4, 6)] == ["a", "b", "c", "d"]
    assert isinstance(results[1], Failure)
    assert results[1].reason == "timeout"
    assert [results[index].reason for index in (3, 5)] == ["worker_died"] * 2


def test_workers_are_replaced():
    processes = [process for _, process in parallel_map(own_process, range(9), 1, 60, tasks_per_worker=3)]
    assert [len(set(processes[start : start + 3])) for start in (0, 3, 6)] == [1, 1, 1]
    assert len(set(processes)) == 3


def test_users_errors_and_bugs_reach_the_caller():
    with pytest.raises(UserError, match="videos=x is wrong"):
        list(parallel_map(misbehave, ["user"], 1, 60))
    with pytest.raises(RuntimeError, match="KeyError"):
        list(parallel_map(misbehave, ["bug"], 1, 60))


def test_tasks_are_taken_only_as_needed():
    taken = []

    def tasks():
        for value in range(1000):
            taken.append(value)
            yield value

    results = parallel_map(double, tasks(), 1, 60, ahead_per_worker=4)
    next(results)
    assert len(taken) <= 6
    results.close()


def wait_for(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.01)
    return path


def test_results_may_come_as_they_are_ready(tmp_path):
    """The first task ends when another has been given back."""
    tasks = [str(tmp_path / "first"), os.devnull, os.devnull]
    results = map_by(partial(Worker, wait_for, 60, 100), Worker.__call__, tasks, 2, 3, in_order=False)
    assert next(results) == (os.devnull, os.devnull)
    (tmp_path / "first").touch()
    assert sorted(result for _, result in results) == sorted(tasks[:2])


def touch(path: str) -> str:
    open(path, "w").close()
    return path


def test_workers_go_on_while_the_caller_is_busy(tmp_path):
    tasks = [str(tmp_path / str(number)) for number in range(4)]
    results = map_by(partial(Worker, touch, 60, 100), Worker.__call__, tasks, 1, 2)
    next(results)
    while len(os.listdir(tmp_path)) < 3:
        time.sleep(0.01)
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2"]
    assert [result for _, result in results] == tasks[1:]


def make_array(size: int) -> tuple[str, np.ndarray]:
    return "seven", np.full(size, 7, np.uint8)


def test_arrays_come_whole_and_can_be_written_to():
    for size, (word, array) in parallel_map(make_array, [0, 1, 10_000_000], 1, 60):
        assert (word, array.shape) == ("seven", (size,))
        assert (array == 7).all()
        array[:] = 8


def answer_more_than_a_pipe_holds(_: int) -> bytes:
    return bytes(10_000_000)


@pytest.mark.timeout(60)
def test_a_process_that_stops_within_its_answer_costs_its_task_only():
    worker = Worker(answer_more_than_a_pipe_holds, 60, 100)
    assert len(worker(0)) == 10_000_000
    workers._set_patience(worker._connection, 0.5)
    worker._connection.send(0)
    # As a machine does that swaps, here before the other half is asked for.
    worker._connection.poll(None)
    os.kill(worker._process.pid, signal.SIGSTOP)
    with pytest.raises(BlockingIOError):
        workers._receive(worker._connection)
    worker.close()


@pytest.mark.timeout(60)
def test_closing_ends_tasks_under_way_at_once(tmp_path):
    results = parallel_map(wait_for, [os.devnull, str(tmp_path / "never")], 2, 60)
    next(results)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 10
    assert not multiprocessing.active_children()


ORPHANING_SCRIPT = """
import sys, time
from exvideo_train.clips.workers import parallel_map
if __name__ == "__main__":
    for _ in parallel_map(print, ["at work", None], 1, 60):
        time.sleep(600)
"""


@pytest.mark.timeout(60)
def test_workers_end_with_their_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANING_SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"at work\n"
    workers_of_it = psutil.Process(parent.pid).children(recursive=True)
    assert workers_of_it
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers_of_it, timeout=30)
    assert not alive


class Slow:
    """Takes its time to be written to the pipe."""

    def __reduce__(self):
        time.sleep(0.3)
        return (str, ())


def answer_slowly(_: int) -> Slow:
    return Slow()


@pytest.mark.parametrize("ready", [False, True])
def test_a_pipe_that_closes_early_is_no_error_for_the_worker(ready, capfd):
    """As it does while a worker starts that is not needed any more, or that was about to answer."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=workers._serve, args=(theirs, answer_slowly, None))
    process.start()
    theirs.close()
    if ready:
        assert ours.recv() == "ready"
        ours.send(1)
    ours.close()
    process.join(60)
    assert process.exitcode == 0
    assert not capfd.readouterr().err
