"""Where a run's figures go: the terminal or log file, metrics.jsonl, and on request wandb and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from exvideo_train.boards import Boards
from exvideo_train.config.experiment import LoggerConfig
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_text, parse_json, read_regular, short
from exvideo_train.training.checkpoint import METRICS_FILE
from exvideo_train.training.sample_measures import check_samples

# A million records.
_MAX_METRICS_BYTES = 1 << 30
# What a record holds of sample videos; the step that they were made at stands beside it for wandb.
SAMPLE_GROUPS = ("samples", "sample_videos")
SAMPLE_STEP = "sample_videos/step"


class RunLogger:
    """Writes records of rank 0; on other ranks every method does nothing.

    Args:
        run_dir: the run folder.
        config: which loggers.
        run_config: the whole config as plain values, for wandb.
        is_main: whether this is rank 0.
    """

    def __init__(self, run_dir: Path, config: LoggerConfig, run_config: Mapping[str, Any], is_main: bool) -> None:
        self.run_dir = run_dir
        self.config = config
        self.run_config = run_config
        self.is_main = is_main
        self._bar: tqdm | None = None
        self._boards: Boards | None = None
        self._started = time.monotonic()

    def start(self, first_step: int, max_steps: int, checkpoint: Path | None = None) -> None:
        """Open the loggers; records of steps after ``first_step``, left by a run that was killed, are dropped.

        A new run folder begins with the records of the ``checkpoint`` that it goes on from.
        """
        if not self.is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None and (checkpoint / METRICS_FILE).exists() and not read_metrics(self.run_dir):
            lines = [line for line, _ in _records(checkpoint / METRICS_FILE)]
            atomic_write_text(self.run_dir / METRICS_FILE, "".join(line + "\n" for line in lines))
        self._drop_records_after(first_step)
        self._started = time.monotonic()
        self._first_step, self._max_steps = first_step, max_steps
        if sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._boards = Boards(
            self.run_dir,
            self.config,
            self.run_config,
            first_step=first_step + 1,
            # The same run folder is the same wandb run after a resume.
            run_id=_wandb_id(self.run_dir) if self.config.wandb else None,
            # Videos are measured when training is steps ahead of them.
            axes=dict.fromkeys(SAMPLE_GROUPS, SAMPLE_STEP),
        )

    def _drop_records_after(self, step: int) -> None:
        path = self.run_dir / METRICS_FILE
        if path.exists():
            # From step 0 nothing is kept: the validation before the first step is made again.
            kept = [line for line, record in _records(path) if 0 < step >= record["step"]]
            atomic_write_text(path, "".join(line + "\n" for line in kept))

    def message(self, text: str) -> None:
        """A line for people; a console that is gone costs the line, not the checkpoint that is still to be saved."""
        if self.is_main:
            with suppress(OSError):
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """One JSONL record; numbers go to wandb and TensorBoard too, nested names joined by "/"."""
        if not self.is_main:
            return
        line = json.dumps(_json_values({"step": step, **values}), default=str)
        self._append(self.run_dir / METRICS_FILE, line + "\n")
        if self._boards is not None:
            own_step = {SAMPLE_STEP: step} if not values.keys().isdisjoint(SAMPLE_GROUPS) else {}
            self._boards.log(step, {**values, **own_step})

    def _append(self, path: Path, line: str) -> None:
        """A full disk costs the line, not the run."""
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(line)
        except OSError as error:
            self.message(f"{path} not written: {error.strerror or error}")
            if path.exists():
                os.truncate(path, size)

    def step_line(self, step: int, values: Mapping[str, Any]) -> None:
        """The console's line of a training step: a moving bar on a terminal, a line with ETA in a log file."""
        if not self.is_main:
            return
        eta = (time.monotonic() - self._started) / max(1, step - self._first_step) * (self._max_steps - step)
        speed = values["speed"]
        parts = [
            f"loss {values['loss']:.4f}",
            f"grad {values['grad_norm']:.3g}",
            f"lr {values['lr']:.2e}",
            f"{speed['step_seconds']:.2f} s/step",
            f"data {speed['phase_seconds']['data']:.2f} s",
            f"{speed['peak_allocated_gib']:.1f} GiB",
        ]
        if speed["mfu"] is not None:
            parts.append(f"MFU {100 * speed['mfu']:.0f} %")
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str("  ".join(parts), refresh=True)
        else:
            self.message(f"step {step}/{self._max_steps}  " + "  ".join(parts) + f"  ETA {format_seconds(eta)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._boards is not None:
            self._boards.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run's metrics.jsonl.

    Raises:
        UserError: a line is no record of a run.
    """
    path = run_dir / METRICS_FILE
    return [record for _, record in _records(path)] if path.exists() else []


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines that ended before the process did, with what they hold: a kill can cut the last one."""
    text = read_regular(path, _MAX_METRICS_BYTES).decode(errors="replace")
    records = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            record = parse_json(line)
            _check_record(record)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no record of a run ({error}); delete that line") from error
        records.append((line, record))
    return records


def _check_record(record: Any) -> None:
    """What a resumed run and its curves read of a record."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("no object with a step")
    numbers = [record.get("loss")]
    for name in ("validation", "validation_ema"):
        if name in record:
            validation = record[name]
            if not isinstance(validation, dict) or not isinstance(validation.get("by_position"), list):
                raise ValueError(f"{name}={short(validation)}")
            numbers += [validation.get("loss"), validation.get("extension_gap"), *validation["by_position"]]
    check_samples(record.get("samples", {}))
    for value in numbers:
        # Null stands for what was not finite.
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{short(value)} where a loss should be")


def _json_values(value: Any) -> Any:
    """Non-finite numbers as null: NaN is no JSON."""
    if isinstance(value, Mapping):
        return {str(name): _json_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wandb_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id"
    if not path.exists():
        import uuid

        atomic_write_text(path, uuid.uuid4().hex[:12])
    return read_regular(path, 1000).decode(errors="replace").strip()


def format_seconds(seconds: float) -> str:
    """3725 -> "1:02:05"; days in front when there are any."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"
