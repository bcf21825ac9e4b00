from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.processes import ended

from exvideo_train.training.interruption import Interruption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested
        assert interruption.reason == number.name
        # Ctrl-C reaches a rank from the terminal and again from the launcher: one request.
        os.kill(os.getpid(), number)
        assert interruption.requested
    assert signal.getsignal(number) == before


def test_time_limit() -> None:
    with Interruption(time_limit_minutes=0.05 / 60) as interruption:
        assert not interruption.requested
        time.sleep(0.06)
        assert interruption.requested
        assert interruption.reason == "time limit"


SECOND_SIGNAL = """
import os, signal, time
from exvideo_train.training import interruption
interruption.SAME_REQUEST_SECONDS = 0.05
with interruption.Interruption():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


def test_a_second_signal_exits_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND_SIGNAL], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert "still here" not in done.stdout
    assert "finishing the step" in done.stderr
    assert "exiting at once" in done.stderr


RANK = """
import sys, time
from exvideo_train.training.interruption import Interruption, find_launchers
with Interruption() as interruption:
    print(*(launcher.pid for launcher in find_launchers()), flush=True)
    while not interruption.requested:
        time.sleep(0.05)
    print(interruption.reason, flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_launcher_is_a_request_to_stop(victim: int, tmp_path: Path) -> None:
    """As `deepspeed` starts ranks: a launcher that starts one on each machine. What started it may go."""
    for name in ("deepspeed", "torchrun", "shell"):
        (tmp_path / name).write_text(LAUNCHER)
    command = [tmp_path / "shell", tmp_path / "deepspeed", tmp_path / "torchrun", "-c", RANK]
    with ended(subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        launchers = [int(pid) for pid in process.stdout.readline().split()]
        shell, *_ = psutil.Process(launchers[0]).parents()[1:]
        assert shell.pid == process.pid
        assert psutil.Process(launchers[1]).ppid() == process.pid
        rank = psutil.Process(launchers[0]).children()[0]
        os.kill(launchers[victim], signal.SIGKILL)
        assert process.stdout.readline() == f"the launcher, process {launchers[victim]}, has died\n"
        rank.wait(20)


READER = """
import os, signal, sys, time
from torch.utils.data import DataLoader
from exvideo_train.training.interruption import obey_only_the_parent, stop_signals_held

def start(worker):
    obey_only_the_parent()

if __name__ == "__main__":
    loader = DataLoader(range(10**6), num_workers=1, multiprocessing_context="spawn", worker_init_fn=start)
    with stop_signals_held():
        batches = iter(loader)
    next(batches)
    (reader,) = [worker.pid for worker in batches._workers]
    print(reader, flush=True)
    sys.stdin.readline()
    for _ in range(100):
        next(batches)
    print("goes on", flush=True)
"""


def test_readers_outlive_signals_but_not_their_rank(tmp_path: Path) -> None:
    """Signals that a terminal or a launcher sends to every process of a job."""
    script = tmp_path / "reader.py"
    script.write_text(READER)
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    reader = int(process.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(reader, number)
    time.sleep(0.3)
    output, _ = process.communicate("\n", timeout=60)
    assert output == "goes on\n"
    assert process.returncode == 0
    assert not psutil.pid_exists(reader) or psutil.Process(reader).status() == psutil.STATUS_ZOMBIE


# Holds the interpreter's lock while gloo's thread waits for it, to give back a tensor that Python has let go of.
LAST_COLLECTIVE = """
import os, sys, time
import torch, torch.distributed as dist
from exvideo_train.training.interruption import end_process_after

def main():
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(os.environ["RANK"]), world_size=2)
    dist.barrier()
    tensor = torch.ones(3)
    tensor.keep = "its Python object"
    work = dist.all_reduce(tensor, async_op=True)
    del tensor, work
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        pass
    print("said before the end")
    sys.exit(2)

sys.setswitchinterval(100)
end_process_after(main)
"""


def test_a_rank_ends_with_its_status_while_gloo_still_gives_back_tensors(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LAST_COLLECTIVE, str(tmp_path / "store")],
            env={**os.environ, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert said == ["said before the end\n"] * 2


ENDS = """
import atexit, sys, threading, time
from exvideo_train.training.interruption import end_process_after

def main():
    atexit.register(print, "registered")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    {end}

end_process_after(main)
"""


@pytest.mark.parametrize(
    ("end", "status", "error"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('in words')", 1, "in words\n"),
        ("raise ValueError('a mistake')", 1, "ValueError: a mistake"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
    ],
)
def test_a_process_ends_as_the_interpreter_would_end_it(end: str, status: int, error: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS.format(end=end)], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert done.stdout == "thread\nregistered\n"
    assert error in done.stderr
    assert ("Traceback" in done.stderr) == end.startswith("raise")
