"""Fixtures shared by all tests: tiny models, the real clip, and commands run as real processes."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from support.trained import Trained

REPOSITORY = Path(__file__).resolve().parent.parent

# Before torch is imported: two workers and two ranks on few cores are slowed, not helped, by more threads; no test
# may reach the network. EXVIDEO_TEST_GPU=1 lets tests see the machine's GPUs.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}
if os.environ.get("EXVIDEO_TEST_GPU") != "1":
    ENVIRONMENT |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
os.environ.update(ENVIRONMENT)


# First, before xdist looks for the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Integration tests start several processes each: one xdist worker takes those of training, which share their runs,
    # one takes the others, each one after another. (Under pytest 9.2 xdist 3.8 does not group: then both workers make
    # the shared runs, which costs time and nothing else; constraints.txt keeps 9.1.)
    for item in items:
        if {"integration", "golden"} & set(item.path.relative_to(REPOSITORY).parts):
            group = "training" if "trained" in getattr(item, "fixturenames", ()) else "data"
            item.add_marker(pytest.mark.xdist_group(group))


def _tiny_model(tmp_path_factory: pytest.TempPathFactory, variant: Literal["5b", "2b"]) -> Path:
    from exvideo_train.models.cogvideox.tiny import write_tiny_model

    base = tmp_path_factory.getbasetemp()
    # Under xdist every worker has its own folder inside the run's; the model is written once, by whoever comes first.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(shared / f"tiny_model_{variant}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return write_tiny_model(shared / f"tiny_model_{variant}", variant)


@pytest.fixture(scope="session")
def tiny_model_5b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CogVideoX-5B (rotary positions, bf16) in the published layout. Read only: copy it to change it."""
    return _tiny_model(tmp_path_factory, "5b")


@pytest.fixture(scope="session")
def tiny_model_2b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CogVideoX-2B (sin-cos positions, fp16) in the published layout. Read only: copy it to change it."""
    return _tiny_model(tmp_path_factory, "2b")


@pytest.fixture(scope="session")
def clip_path() -> Path:
    """The real clip: 132 frames, 1280x720, 25 fps, H.264 with sound."""
    return REPOSITORY / "examples" / "clips" / "bigbuckbunny.mp4"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_5b: Path) -> Trained:
    """Runs of the tiny model on one, two and four ranks, made when first asked for."""
    from support.trained import Trained

    return Trained(tmp_path_factory.mktemp("trained"), tiny_model_5b)


@dataclass(frozen=True)
class CommandResult:
    """How a command ended. ``str()`` is what one wants to read when it ended wrongly."""

    command: list[str]
    status: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return (
            f"status {self.status}: {' '.join(self.command)}\n"
            f"--- stdout\n{_tail(self.stdout)}\n--- stderr\n{_tail(self.stderr)}"
        )


def _tail(text: str, num_lines: int = 60) -> str:
    lines = text.splitlines()
    left_out = [f"... {len(lines) - num_lines} lines before"] if len(lines) > num_lines else []
    return "\n".join(left_out + lines[-num_lines:])


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def command_line(arguments: Sequence[str | Path]) -> list[str]:
    """The process for a command as users write it.

    ``data_prep/x.py a=b`` and ``-m package.module a=b`` run with this interpreter; ``deepspeed --num_gpus 2
    launch/train.py a=b`` runs through the launcher with a port of its own. Paths of the repository may be relative.
    """
    words = [str(argument) for argument in arguments]
    words = [
        str(REPOSITORY / word) if word.endswith(".py") and (REPOSITORY / word).is_file() else word for word in words
    ]
    if words[0] == "deepspeed":
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port()), *words[1:]]
    return [sys.executable, *words]


def command_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of commands: this process's, without what pytest and a launcher leave in it."""
    ours = ("PYTEST", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, **ENVIRONMENT, **(extra or {})}


RunCommand = Callable[..., CommandResult]


@pytest.fixture
def run_command(tmp_path: Path) -> RunCommand:
    """Run a command as a process of its own, from an empty folder, and wait for it.

    ``run_command(["data_prep/build_manifest.py", "source=folder", ...], status=0, timeout_seconds=300, cwd=None,
    env=None)`` returns a :class:`CommandResult`; another exit status than ``status`` (None takes any) or a timeout
    fails the test with the command's output. No process of it survives the call.
    """
    folder = tmp_path / "cwd"

    def run(
        arguments: Sequence[str | Path],
        *,
        status: int | None = 0,
        timeout_seconds: float = 300.0,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> CommandResult:
        folder.mkdir(exist_ok=True)
        command = command_line(arguments)
        process = subprocess.Popen(
            command,
            cwd=cwd or folder,
            env=command_environment(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        timed_out = False
        try:
            stdout, stderr = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
            _kill_group(process)
            stdout, stderr = process.communicate()
        finally:
            _kill_group(process)
        result = CommandResult(command, process.returncode, stdout, stderr)
        if timed_out:
            pytest.fail(f"not finished after {timeout_seconds:g} seconds, {result}", pytrace=False)
        if status is not None and result.status != status:
            pytest.fail(f"expected status {status}, {result}", pytrace=False)
        return result

    return run


def _kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
