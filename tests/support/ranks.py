"""Ranks of a job as processes of the tests' own, with the environment that a launcher would give them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TRAIN = REPOSITORY / "launch" / "train.py"
MANY_RUNS = Path(__file__).resolve().parent / "many_runs.py"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a command on the CPU, without pytest's and a launcher's variables."""
    ours = ("PYTEST", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
    return {**kept, **fixed, **(extra or {})}


class Ranks:
    """``world_size`` processes of one command, writing into one log file; a context that leaves none alive.

    Args:
        command: script and arguments, run with this interpreter.
        log: file that gets stdout and stderr of all ranks.
        launcher: start them through "deepspeed" or "torchrun" instead; then there is one process, the launcher's.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        world_size: int,
        log: Path,
        *,
        launcher: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.world_size = world_size
        self.log = log
        words = [str(word) for word in command]
        port = str(free_port())
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(log, "ab")  # noqa: SIM115
        self._launched = launcher is not None
        self.processes: list[subprocess.Popen[bytes]] = []
        if launcher == "deepspeed":
            start = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world_size)]
            self._start([*start, "--master_port", port, *words], environment(env))
        elif launcher == "torchrun":
            start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world_size)]
            self._start([*start, "--master_addr", "127.0.0.1", "--master_port", port, *words], environment(env))
        else:
            for rank in range(world_size):
                place = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                self._start([sys.executable, *words], environment({**(env or {}), **place}))

    def _start(self, command: list[str], env: dict[str, str]) -> None:
        self.processes.append(
            subprocess.Popen(command, env=env, stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True)
        )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._file.close()

    def kill(self) -> None:
        """End every process of every rank, at once."""
        for process in self.processes:
            # A rank that has ended may have given its number to a stranger; a launcher may leave its ranks behind.
            if process.poll() is None or self._launched:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait(self, timeout_seconds: float = 400.0) -> list[int]:
        """Exit statuses by process; fails with the log's end when they do not end in time."""
        deadline = time.monotonic() + timeout_seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not finished after {timeout_seconds:g} s:\n{self.tail()}") from None

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_seconds: float = 300.0) -> None:
        """Wait until a condition holds while the processes run."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after {timeout_seconds:g} s:\n{self.tail()}"
            ended = [process.poll() for process in self.processes]
            assert all(status is None for status in ended), f"ended {ended} before {what}:\n{self.tail()}"
            time.sleep(0.02)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self, num_lines: int = 60) -> str:
        return "\n".join(self.output().splitlines()[-num_lines:])

    def rank_pids(self) -> dict[int, int]:
        """Process ids of the ranks under a launcher, by rank."""
        import psutil

        found = {}
        for process in psutil.Process(self.processes[0].pid).children(recursive=True):
            with suppress(psutil.Error):
                words = process.cmdline()
                if any(word.endswith("launch/train.py") for word in words) and "-c" not in words:
                    rank = process.environ().get("RANK")
                    if rank is not None and "deepspeed.launcher.launch" not in words:
                        found[int(rank)] = process.pid
        return found


def finished(ranks: Ranks, timeout_seconds: float = 400.0) -> str:
    """The output of ranks that must all end with status 0."""
    statuses = ranks.wait(timeout_seconds)
    assert set(statuses) == {0}, f"statuses {statuses}:\n{ranks.tail(100)}"
    return ranks.output()


def many_runs(specs: Sequence[Mapping[str, Any]], world_size: int, folder: Path) -> dict[str, Any]:
    """Run several trainings one after another in one set of ranks (see many_runs.py).

    Returns:
        {name of the run: {"status", "error", "messages", "batches" of every rank, ...}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec_file = folder / f"specs_{world_size}_{time.time_ns()}.json"
    spec_file.write_text(json.dumps(list(specs), default=str))
    with Ranks([MANY_RUNS, spec_file], world_size, spec_file.with_suffix(".log")) as ranks:
        finished(ranks, 850.0)
    merged: dict[str, Any] = {}
    for rank in range(world_size):
        for name, result in json.loads(spec_file.with_suffix(f".rank{rank}.json").read_text()).items():
            kept = merged.setdefault(name, result)
            kept.setdefault("by_rank", []).append(result["batches"])
    return merged
