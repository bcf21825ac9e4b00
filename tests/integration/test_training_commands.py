"""Training as users start it in its lesser ways: by a launch recipe, as a dry run, with sample videos beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import REPOSITORY, TRAIN, Ranks, environment, finished
from support.trained import Trained
from support.wandb_file import read_history
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_the_torchrun_recipe_and_a_dry_run(trained: Trained) -> None:
    """Two ranks check everything, say what would run, and leave nothing behind."""
    result = subprocess.run(
        ["bash", "launch/torchrun.sh", *trained.overrides("dry", "data.batch_size=2", "dry_run=true")],
        cwd=REPOSITORY,
        env=environment({"NPROC": "2", "TORCHRUN": str(Path(sys.executable).with_name("torchrun"))}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "2 ranks on cpu = 2 data x 1 sequence, ZeRO-2" in result.stdout
    assert "from step 0" in result.stdout
    assert not trained.run_dir("dry").exists()


def test_sample_videos_are_made_and_measured_beside_training(trained: Trained, tmp_path: Path) -> None:
    options = trained.overrides(
        "sampled",
        "validation.sample_every_steps=2",
        "validation.sample_prompts=[a rabbit]",
        "num_inference_steps=2",
        "logger.wandb=true",
        "logger.tensorboard=true",
    )
    with Ranks([TRAIN, *options, "max_steps=2"], 1, tmp_path / "log.txt") as ranks:
        output = finished(ranks)
    run_dir = trained.run_dir("sampled")
    folder = run_dir / "samples" / "step_00000002"
    assert f"sample videos: {folder}" in output, (folder / "log.txt").read_text()
    assert len(list(folder.glob("with_adapter/*.mp4"))) == 1
    sampled, final = load_file(folder / "adapter.safetensors"), trained.adapter("sampled")
    assert all(torch.equal(sampled[name], final[name]) for name in final)

    (measured,) = [record for record in trained.records("sampled") if "samples" in record]
    assert (measured["step"], measured["sample_videos"]) == (2, {"measured": 1, "failed": 0})
    values = measured["samples"]["with_adapter"]
    means = json.loads((folder / "measures.json").read_text())["means"]["with_adapter"]
    assert values == means
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("samples/with_adapter/sharpness")
    assert (point.step, point.value) == (2, pytest.approx(values["sharpness"]))
    history = [row for file in run_dir.glob("wandb/offline-run-*/*.wandb") for row in read_history(file)]
    (row,) = [row for row in history if "samples/with_adapter/sharpness" in row]
    assert (row["sample_videos/step"], row["samples/with_adapter/sharpness"]) == (2, values["sharpness"])

    # As if the run had been killed between measuring and recording, and with the next videos failing.
    (run_dir / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in trained.records("sampled") if "samples" not in record)
    )
    (run_dir / "samples" / "step_00000004").mkdir()
    (run_dir / "samples" / "step_00000004" / "with_adapter").touch()
    before = (folder / "measures.json").stat()
    with Ranks([TRAIN, *options, "max_steps=4"], 1, tmp_path / "again.txt") as ranks:
        output = finished(ranks)
    assert [record["step"] for record in trained.records("sampled") if "loss" in record] == [1, 2, 3, 4]
    again, failed = [record for record in trained.records("sampled") if "sample_videos" in record]
    assert again == measured
    after = (folder / "measures.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (failed["step"], failed["sample_videos"]) == (4, {"measured": 0, "failed": 1})
    assert "sample videos failed (status" in output
    assert "of step_00000004 that could not be measured: of 1 prompts none was made" in output
