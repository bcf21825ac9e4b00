from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from exvideo_train.config.commands import Sample, Train
from exvideo_train.config.experiment import AttentionKernel, Experiment, Positions, SamplerKind, TimestepSpacing
from exvideo_train.entry import compose_config, quote_overrides, to_dataclass
from exvideo_train.training.samples import SampleProcess, environment


def test_failing_sample_videos_are_told_and_harm_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    config = Experiment()
    config.model.path = str(tmp_path / "no model")
    samples = SampleProcess(config, tmp_path, said.append)
    folder = tmp_path / "samples" / "step_00000010"
    samples.start(folder / "adapter.safetensors", ["a caption\nof two lines"])
    assert json.loads((folder / "prompts.jsonl").read_text()) == {"prompt": "a caption\nof two lines"}
    samples.start(tmp_path / "samples" / "step_00000020" / "adapter.safetensors", ["a caption"])
    assert said == ["no sample videos for step_00000020: the last ones are not finished"]
    samples.finish()
    assert said[1] == f"sample videos failed (status 2); see {folder / 'log.txt'}"
    assert "does not exist" in (folder / "log.txt").read_text()
    samples.finish()


def test_videos_that_take_too_long_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    config = Experiment()
    config.validation.sample_wait_minutes = 0.01
    samples = SampleProcess(config, tmp_path, said.append)
    monkeypatch.setattr(SampleProcess, "_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])
    folder = tmp_path / "samples" / "step_00000010"
    samples.start(folder / "adapter.safetensors", ["a caption"])
    assert samples._process is not None
    process = samples._process
    samples.finish()
    assert process.returncode == -signal.SIGKILL
    assert said == [f"sample videos given up 0.01 minutes after the end of training: {folder}"]


def test_without_prompts_nothing_is_started(tmp_path: Path) -> None:
    said: list[str] = []
    samples = SampleProcess(Experiment(), tmp_path, said.append)
    samples.start(tmp_path / "samples" / "step_00000010" / "adapter.safetensors", [])
    assert said == ["no sample videos for step_00000010: validation.sample_prompts is empty"]


def test_the_process_is_no_rank_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & environment().keys()
    assert "PATH" in environment()


def test_options_of_the_run_arrive_at_sampling(tmp_path: Path) -> None:
    config = Train(latents="store", run_dir="run")
    changed = {"num_frames": 57, "guidance_scale": 3.5, "num_inference_steps": 7, "seed": 11, "vae_tiling": True}
    changed |= {"batched_guidance": False, "negative_prompt": "a, 'blur' {of} $x", "positions": Positions.interpolated}
    changed |= {"timestep_spacing": TimestepSpacing.linspace, "scheduler": SamplerKind.dpm}
    for name, value in changed.items():
        setattr(config, name, value)
    config.memory.attention, config.model.revision = AttentionKernel.math, "v1"
    command = SampleProcess(config, tmp_path, print)._command(tmp_path / "a, b.safetensors", tmp_path / "p.jsonl")
    assert command[:3] == [sys.executable, "-m", "exvideo_train.sample"]
    composed = to_dataclass(compose_config("sample", quote_overrides(command[3:], Sample), Sample), Sample)
    assert {name: getattr(composed, name) for name in changed} == changed
    assert (composed.memory, composed.model) == (config.memory, config.model)
    assert (composed.adapter, composed.overwrite) == ([str(tmp_path / "a, b.safetensors")], True)
