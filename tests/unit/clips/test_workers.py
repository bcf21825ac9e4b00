"""The parallel map: order, hangs, deaths, recycling, errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from exvideo_train.clips import workers
from exvideo_train.clips.workers import Failed, parallel_map
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
    assert isinstance(results[1], Failed)
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
    process = context.Process(target=workers._serve, args=(theirs, answer_slowly))
    process.start()
    theirs.close()
    if ready:
        assert ours.recv() == ("ready", None)
        ours.send(1)
    ours.close()
    process.join(60)
    assert process.exitcode == 0
    assert not capfd.readouterr().err
