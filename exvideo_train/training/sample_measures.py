"""Sample videos to figures of the run: a process beside training measures them, whatever happens to it.

``exvideo_train.evaluation.samples`` writes ``measures.json`` into the folder of the videos; this room reads it and
imports nothing of evaluation, which reads videos.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exvideo_train.errors import UserError
from exvideo_train.files import parse_json, read_regular, short

MEASURES_FILE = "measures.json"
PROMPTS_FILE = "prompts.jsonl"
LOG_FILE = "log.txt"
# Processes beside training give way to it. A command, as code between fork and exec may wait for ever in a process that
# has threads.
AT_LOW_PRIORITY = ("nice", "-n", "10")
_MAX_BYTES = 64 << 20
Record = dict[str, Any]


class SampleMeasures:
    """Measures folders of sample videos one after another, and gives their figures to ``record``.

    Args:
        run_dir: videos lie in samples/step_N/ in it.
        environment: of the process.
        log: told what went wrong.
        record: called with the step of the videos and what was measured: ``samples``, the mean of each measure by
            variant, and ``sample_videos``, how many were measured and how many failed.
    """

    def __init__(
        self,
        run_dir: Path,
        environment: Mapping[str, str],
        log: Callable[[str], None],
        record: Callable[[int, Record], None],
    ) -> None:
        self.run_dir, self.environment, self.log, self.record = run_dir, environment, log, record
        self._waiting: deque[Path] = deque()
        self._folder = run_dir
        self._process: subprocess.Popen[bytes] | None = None

    def resume(self, step: int, records: Sequence[Record]) -> None:
        """Videos up to this step that no record tells of, as the run ended before: they are measured now."""
        told = {record["step"] for record in records if "sample_videos" in record}
        try:
            folders = sorted((self.run_dir / "samples").glob("step_" + "[0-9]" * 8))
        except OSError as error:
            self.log(f"sample videos of before are not measured: {error}")
            return
        for folder in folders:
            number = _step_of(folder)
            if 0 < number <= step and number not in told:
                self.add(folder)

    def add(self, folder: Path) -> None:
        """Measure the videos that lie in a folder, in its turn; those of its prompts that are not there have failed."""
        self._waiting.append(folder)
        self.poll()

    def poll(self) -> None:
        """Record what a process that has ended found, and begin with the next folder."""
        if self._process is not None and self._process.poll() is not None:
            self._tell(self._process.returncode)
            self._process = None
        if self._process is None and self._waiting:
            self._folder = self._waiting.popleft()
            self._start()

    def finish(self, minutes: float) -> None:
        """Wait for what is left, but not for ever."""
        deadline = time.monotonic() + 60 * minutes
        self.poll()
        while self._process is not None:
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                names = ", ".join(folder.name for folder in (self._folder, *self._waiting))
                self.log(f"measures of sample videos given up after {minutes:g} minutes: {names}")
                self._waiting.clear()
            self.poll()

    def _start(self) -> None:
        command = [*AT_LOW_PRIORITY, sys.executable, "-m", "exvideo_train.evaluation.samples", str(self._folder)]
        try:
            with open(self._folder / LOG_FILE, "ab") as log_file:
                self._process = subprocess.Popen(
                    command,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    env=dict(self.environment),
                    start_new_session=True,
                )
        except OSError as error:
            self._fail(str(error))

    def _tell(self, status: int) -> None:
        if status:
            self._fail(f"status {status}; see {self._folder / LOG_FILE}")
            return
        try:
            found = read_measures(self._folder / MEASURES_FILE)
        except UserError as error:
            self._fail(str(error))
            return
        num_missing = max(0, self._num_prompts() - found.num_prompts)
        why = [*found.failed, *([f"of {num_missing} prompts none was made"] if num_missing else [])]
        if why:
            self.log(f"sample videos of {self._folder.name} that could not be measured: {'; '.join(why)}")
        counts = {"measured": found.num_measured, "failed": len(found.failed) + num_missing}
        self._record({"samples": found.means, "sample_videos": counts})

    def _fail(self, why: str) -> None:
        self.log(f"sample videos of {self._folder.name} not measured: {why}")
        self._record({"sample_videos": {"measured": 0, "failed": self._num_prompts()}})

    def _record(self, record: Record) -> None:
        self.record(_step_of(self._folder), record)

    def _num_prompts(self) -> int:
        try:
            return len(read_regular(self._folder / PROMPTS_FILE, _MAX_BYTES).splitlines())
        except UserError:
            # A folder that was never begun.
            return 0


@dataclass(frozen=True)
class Measures:
    """What ``measures.json`` says.

    Attributes:
        means: of each measure, by variant.
        num_prompts: of which videos were made.
        failed: videos that could not be measured, in words.
    """

    means: dict[str, dict[str, float | None]]
    num_prompts: int
    num_measured: int
    failed: list[str]


def read_measures(path: Path) -> Measures:
    """Read ``measures.json``.

    Raises:
        UserError: it cannot be read, or is not what ``exvideo_train.evaluation.samples`` writes.
    """
    try:
        content = parse_json(read_regular(path, _MAX_BYTES))
        check_samples(content["means"])
        num_measured = sum(len(videos) for videos in content["videos"].values())
        failed = [str(line) for line in content["failed"]]
        return Measures(content["means"], int(content["num_prompts"]), num_measured, failed)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not what measuring writes ({error}); remove it") from error


def check_samples(means: Any) -> None:
    """Raises ValueError: not numbers by variant and measure."""
    if not isinstance(means, dict) or not all(isinstance(values, dict) for values in means.values()):
        raise ValueError(f"samples={short(means)}")
    for values in means.values():
        for name, value in values.items():
            if value is not None and type(value) not in (int, float):
                raise ValueError(f"{short(name)}={short(value)} where a number should be")


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
