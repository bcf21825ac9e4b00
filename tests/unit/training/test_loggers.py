from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from exvideo_train.config.experiment import LoggerConfig
from exvideo_train.training.loggers import RunLogger, format_seconds, read_metrics


def logger(run_dir: Path, is_main: bool = True) -> RunLogger:
    return RunLogger(run_dir, LoggerConfig(), {}, is_main)


def write_lines(run_dir: Path, *steps: int, half: str = "") -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps)
    (run_dir / "metrics.jsonl").write_text(lines + half)


def test_records_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    write_lines(tmp_path, 0, 1, 2, 3, half='{"step": 4, "lo')
    log = logger(tmp_path)
    log.start(2, 10)
    log.record(3, {"loss": 0.5})
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_run_killed_before_its_first_checkpoint_begins_with_an_empty_file(tmp_path: Path) -> None:
    write_lines(tmp_path, 0, 1, 2)
    log = logger(tmp_path)
    log.start(0, 10)
    log.record(0, {"validation": {"loss": 1.0, "extension_gap": None, "by_position": [1.0]}})
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]


def test_non_finite_numbers_are_null(tmp_path: Path) -> None:
    log = logger(tmp_path)
    log.start(0, 10)
    log.record(1, {"loss": math.nan, "nested": {"norm": math.inf, "by_position": [1.0, -math.inf]}})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "loss": None, "nested": {"norm": None, "by_position": [1.0, None]}}


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logger(tmp_path / "run", is_main=False)
    log.start(0, 10)
    log.record(1, {"loss": 1.0})
    log.message("nothing")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_step_line_in_a_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logger(tmp_path)
    log.start(0, 100)
    speed = {"step_seconds": 2.0, "phase_seconds": {"data": 0.1}, "peak_allocated_gib": 70.0, "mfu": 0.43}
    log.step_line(50, {"loss": 0.25, "grad_norm": 0.5, "lr": 1e-4, "speed": speed})
    line = capsys.readouterr().out
    for part in ("step 50/100", "loss 0.2500", "lr 1.00e-04", "2.00 s/step", "70.0 GiB", "MFU 43 %", "ETA 0:00:0"):
        assert part in line


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (5, 3725, 90061)] == ["0:00:05", "1:02:05", "1d 1:01:01"]
