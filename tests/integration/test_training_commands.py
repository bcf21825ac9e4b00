"""Training as users start it in its lesser ways: by a launch recipe, as a dry run, with sample videos beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.ranks import REPOSITORY, TRAIN, Ranks, environment, finished
from support.trained import Trained


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


def test_sample_videos_are_made_beside_training(trained: Trained, tmp_path: Path) -> None:
    options = trained.overrides(
        "sampled",
        "max_steps=2",
        "validation.sample_every_steps=2",
        "validation.sample_prompts=[a rabbit]",
        "num_inference_steps=2",
    )
    with Ranks([TRAIN, *options], 1, tmp_path / "log.txt") as ranks:
        output = finished(ranks)
    folder = trained.run_dir("sampled") / "samples" / "step_00000002"
    assert f"sample videos: {folder}" in output, (folder / "log.txt").read_text()
    assert len(list(folder.glob("*.mp4"))) == 1
    sampled, final = load_file(folder / "adapter.safetensors"), trained.adapter("sampled")
    assert all(torch.equal(sampled[name], final[name]) for name in final)
