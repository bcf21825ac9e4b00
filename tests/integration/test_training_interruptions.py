"""Signals, time limits, killed and hanging ranks: real processes, under the launchers too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.ranks import REPOSITORY, TRAIN, Ranks, finished
from support.trained import STEPS, Trained

# Longer than any phase of the start takes on a busy machine.
TIMEOUT_SECONDS = 12
HANGING_TRAIN = REPOSITORY / "tests" / "support" / "hanging_store.py"


def overrides(trained: Trained, name: str, *more: str) -> list[str | Path]:
    return [TRAIN, *trained.overrides(name, "data.batch_size=2", "checkpoint.every_steps=5", *more)]


def records(trained: Trained, name: str) -> list[dict[str, Any]]:
    path = trained.run_dir(name) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def last_step(trained: Trained, name: str) -> int:
    found = records(trained, name)
    return found[-1]["step"] if found else 0


def wait_until_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, f"processes {alive} still run after {seconds:g} s"
        time.sleep(0.1)


def test_stopped_three_ways_the_run_equals_an_undisturbed_one(trained: Trained, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM under the launcher, SIGTERM to one rank, a time limit: then the run is finished."""
    command = overrides(trained, "chain")

    # 1. As a terminal or Slurm does: every process of the launcher's group gets the signal, readers of data too.
    with Ranks([*command, "data.num_workers=1"], 2, tmp_path / "launcher.log", launcher="deepspeed") as ranks:
        ranks.wait_for(lambda: last_step(trained, "chain") >= 2, "second step")
        pids = list(ranks.rank_pids().values())
        os.killpg(ranks.processes[0].pid, signal.SIGTERM)
        wait_until_gone(pids, 30)
        output = ranks.output()
    step = last_step(trained, "chain")
    assert f"stopped after step {step} (SIGTERM); the same command resumes" in output
    assert "Traceback" not in output, output
    assert trained.checkpoint("chain", step).exists()

    # 2. The time limit, through the launcher: its status is the ranks' own.
    limited = [*command, "safety.time_limit_minutes=0.01"]
    with Ranks(limited, 2, tmp_path / "limit.log", launcher="deepspeed") as ranks:
        assert ranks.wait() == [75], ranks.tail()
        output = ranks.output()
    assert f"from step {step}" in output
    assert "(time limit); the same command resumes" in output
    assert last_step(trained, "chain") > step
    step = last_step(trained, "chain")

    # 3. One rank alone is told: all of them stop after the same step.
    with Ranks(command, 2, tmp_path / "one_rank.log") as ranks:
        ranks.wait_for(lambda: last_step(trained, "chain") > step, "step")
        os.kill(ranks.processes[1].pid, signal.SIGINT)
        assert ranks.wait(60) == [75, 75], ranks.tail()
        assert f"stopped after step {last_step(trained, 'chain')} (SIGINT); the same command resumes" in ranks.output()

    with Ranks(command, 2, tmp_path / "rest.log", launcher="torchrun") as ranks:
        finished(ranks)
    assert trained.two["two"]["status"] == 0
    assert [record["step"] for record in records(trained, "chain")] == list(range(1, STEPS + 1))
    assert trained.losses("chain") == trained.losses("two")
    chain, whole = trained.adapter("chain"), trained.adapter("two")
    assert all(torch.equal(chain[name], whole[name]) for name in whole)


def test_a_killed_rank_brings_the_job_down_and_is_named(trained: Trained, tmp_path: Path) -> None:
    command = overrides(trained, "killed", "max_steps=100000")
    with Ranks(command, 2, tmp_path / "log", launcher="deepspeed") as ranks:
        ranks.wait_for(lambda: last_step(trained, "killed") >= 6, "sixth step")
        os.kill(ranks.rank_pids()[1], signal.SIGKILL)
        started = time.monotonic()
        (status,) = ranks.wait(60)
        assert time.monotonic() - started < 45
        assert status != 0
        assert "rank 0 ends the job: rank 1 died" in ranks.output(), ranks.tail()
        assert "the same command resumes" in ranks.output()


def test_a_killed_launcher_ends_its_ranks_and_nobody_else_takes_their_folder(trained: Trained, tmp_path: Path) -> None:
    command = overrides(trained, "launcher", "max_steps=100000")
    with Ranks(command, 2, tmp_path / "log", launcher="deepspeed") as ranks:
        ranks.wait_for(lambda: last_step(trained, "launcher") > 0, "step")
        pids = ranks.rank_pids()
        with Ranks(command, 1, tmp_path / "second.log") as second:
            assert second.wait(60) == [2], second.tail()
            assert f"error: run_dir={trained.run_dir('launcher')}: process {pids[0]} on " in second.output()
            assert "Traceback" not in second.output()
        # The grandparent of the ranks: their parent lives on.
        runner = ranks.processes[0].pid
        os.kill(runner, signal.SIGKILL)
        try:
            wait_until_gone(list(pids.values()), 30)
        finally:
            for pid in pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    step = last_step(trained, "launcher")
    said = f"stopped after step {step} (the launcher, process {runner}, has died); the same command resumes"
    assert said in ranks.output(), ranks.tail()
    assert trained.checkpoint("launcher", step).exists()
    assert not (trained.run_dir("launcher") / "in_use").exists()


def test_hanging_ranks_are_named_within_the_time_limit(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process first; then a rank whose file system answers no more."""
    command = overrides(trained, "hanging", "max_steps=100000", f"safety.rank_timeout_seconds={TIMEOUT_SECONDS}")
    with Ranks(command, 2, tmp_path / "stopped.log") as ranks:
        ranks.wait_for(lambda: last_step(trained, "hanging") >= 6, "sixth step")
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        assert ranks.processes[0].wait(TIMEOUT_SECONDS + 20) == 74, ranks.tail()
        assert f"rank 0 ends the job: rank 1 died: silent for {TIMEOUT_SECONDS} s" in ranks.output(), ranks.tail()
        os.kill(ranks.processes[1].pid, signal.SIGCONT)
        assert ranks.processes[1].wait(30) != 0

    marker = tmp_path / "hang"
    monkeypatch.setenv("STORE_HANGS_WHEN", str(marker))
    with Ranks([HANGING_TRAIN, *command[1:]], 2, tmp_path / "waiting.log") as ranks:
        before = last_step(trained, "hanging")
        ranks.wait_for(lambda: last_step(trained, "hanging") > before, "step")
        marker.touch()
        statuses = ranks.wait(2 * TIMEOUT_SECONDS + 30)
        assert set(statuses) <= {74, 1}
        assert 74 in statuses
        assert f"no progress for {TIMEOUT_SECONDS} s; furthest behind: rank 1" in ranks.output(), ranks.tail()
        assert "'reading data'" in ranks.output()


@pytest.mark.parametrize("number", ["KILL"])
def test_random_kills_leave_no_trace(number: str, tmp_path: Path) -> None:
    """The script with 20 kills, with 3; SIGTERM is covered above."""
    script = REPOSITORY / "benchmarks" / "kill_training.py"
    command = [sys.executable, str(script), "--kills", "3", "--steps", "80", "--signal", number, "--seed", "4"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal bit for bit" in done.stdout


def test_a_mistake_is_told_once_by_all_ranks_together(trained: Trained, tmp_path: Path) -> None:
    command = overrides(trained, "mistake", "memory.zero_stage=4")
    with Ranks(command, 2, tmp_path / "log") as ranks:
        assert ranks.wait(60) == [2, 2], ranks.tail()
        assert ranks.output().count("error: memory.zero_stage=4") == 1
        assert "Traceback" not in ranks.output()
    assert not trained.run_dir("mistake").exists()
