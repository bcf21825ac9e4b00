"""One holder at a time: real processes, killed, stopped and on another machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from exvideo_train import locks
from exvideo_train.errors import UserError
from exvideo_train.locks import hold

HOLDER = """
import sys, time
from pathlib import Path
from exvideo_train import locks
path, place, sign_seconds = sys.argv[1:]
if place:
    # Two machines' kernels do not know each other's processes.
    locks._place = lambda: place
locks.SIGN_OF_LIFE_SECONDS = float(sign_seconds)
try:
    with locks.hold(Path(path), "run_dir=x", "wait"):
        print("held", flush=True)
        sys.stdin.readline()
except locks.UserError as error:
    print(error, flush=True)
"""


@contextmanager
def holder(path: Path, place: str = "", sign_seconds: float = 5.0) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock, or says why it does not, until it gets a line or is killed."""
    command = [sys.executable, "-c", HOLDER, str(path), place, str(sign_seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as first:
        assert first_line(first) == "held"
        told = rf"^run_dir=a: process {first.pid} on \S+ \(since 20.*; stop it first$"
        with pytest.raises(UserError, match=told), hold(path, "run_dir=a", "stop it first"):
            pass
        first.communicate("\n", timeout=20)
    assert not path.exists()
    with hold(path, "run_dir=a", "stop it first"):
        assert path.is_dir()
    assert not path.exists()


def test_a_killed_holder_is_known_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as first:
        assert first_line(first) == "held"
        os.kill(first.pid, signal.SIGKILL)
        # Not waited for: a launcher that is slow to reap its children must not keep the lock either.
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        began = time.monotonic()
        with hold(path, "run_dir=a", ""):
            assert time.monotonic() - began < 0.5
            assert len(list(path.iterdir())) == 1
    assert not path.exists()


def test_a_stopped_holder_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as first:
        assert first_line(first) == "held"
        os.kill(first.pid, signal.SIGSTOP)
        (record,) = path.iterdir()
        os.utime(record, (1e9, 1e9))
        with pytest.raises(UserError, match=f"process {first.pid} "), hold(path, "run_dir=a", ""):
            pass


def test_of_many_that_start_together_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with ExitStack() as stack:
        processes = [stack.enter_context(holder(path)) for _ in range(4)]
        said = [first_line(process) for process in processes]
    assert said.count("held") == 1, said
    assert sum("is at work in it; wait" in line for line in said) == 3, said


def test_a_holder_on_another_machine_is_told_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lock"
    monkeypatch.setattr(locks, "SILENCE_SECONDS", 2.0)
    with holder(path, "another machine", 0.2) as first:
        assert first_line(first) == "held"
        with pytest.raises(UserError, match=f"process {first.pid} "), hold(path, "run_dir=a", ""):
            pass
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        # From here nobody can tell that the process is gone.
        began = time.monotonic()
        with hold(path, "run_dir=a", ""):
            assert 0.5 < time.monotonic() - began < 10
    assert f"run_dir=a: process {first.pid} on " in capsys.readouterr().out


def test_a_holder_that_was_taken_for_dead_ends_before_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path, "another machine", 0.2) as first:
        assert first_line(first) == "held"
        os.kill(first.pid, signal.SIGSTOP)
        (record,) = path.iterdir()
        os.utime(record, (1e9, 1e9))
        with hold(path, "run_dir=a", ""):
            os.kill(first.pid, signal.SIGCONT)
            assert first.wait(20) == locks.TAKEN_OVER_STATUS


OTHER_SHAPES = {
    "empty": "",
    "cut": "{",
    "list": "[]",
    "null": "null",
    "fields missing": '{"pid": 1}',
    "deep": "[" * 4000,
    "infinite pid": '{"pid": 1e999, "host": "", "place": "", "start": 0, "since": 0}',
    "no pid": json.dumps({"pid": -1, "host": "\x1b[2J", "place": locks._place(), "start": "1", "since": ""}),
}


@pytest.mark.parametrize("text", OTHER_SHAPES.values(), ids=OTHER_SHAPES)
def test_a_record_of_another_shape_is_judged_by_its_age_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock"
    path.mkdir()
    (path / "a.json").write_text(text)
    os.utime(path / "a.json", (1e9, 1e9))
    with hold(path, "run_dir=a", ""):
        assert not (path / "a.json").exists()


def test_a_number_given_to_another_process_is_not_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.mkdir()
    with hold(path, "run_dir=a", ""):
        (record,) = path.iterdir()
        content = json.loads(record.read_text())
    path.mkdir()
    (path / "a.json").write_text(json.dumps({**content, "start": "1"}))
    with hold(path, "run_dir=a", ""):
        assert not (path / "a.json").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "lock"
    with pytest.raises(UserError, match=f"^run_dir=a: cannot write {path}: "), hold(path, "run_dir=a", ""):
        pass
