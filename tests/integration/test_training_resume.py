"""An interrupted run goes on as if nothing had happened."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.trained import CROSS_STEPS, SHORT_CLIPS, STEPS, Trained

# Resumed run, and the run without interruption.
RESUMED = [
    ("stopped", "two"),
    ("zero3_resumed", "zero3"),
    ("offloaded_resumed", "offloaded"),
    ("dropout_resumed", "dropout"),
    ("mixed_resumed", "mixed"),
]


def assert_equal_files(first: Path, second: Path) -> None:
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} of {first} and {second}"


@pytest.mark.parametrize(("resumed", "whole"), RESUMED)
def test_resume_is_exact_bit_for_bit(trained: Trained, resumed: str, whole: str) -> None:
    assert trained.two[whole]["status"] == 0
    if resumed != "stopped":
        # In a folder of its own: the checkpoint brought the records of the steps before it.
        assert trained.two[resumed]["by_rank"][0][0]["step"] > 1
    assert trained.losses(resumed) == trained.losses(whole)
    assert trained.grad_norms(resumed) == trained.grad_norms(whole)
    assert_equal_files(*(trained.run_dir(run) / "adapter.safetensors" for run in (resumed, whole)))


def test_a_stop_saves_and_says_resume_me(trained: Trained) -> None:
    stopped, again = trained.two["stopped"], trained.two["stopped again"]
    assert (stopped["status"], again["status"]) == (75, 0)
    assert any("stopped after step 7" in message for message in stopped["messages"])
    assert any("from step 7" in message for message in again["messages"])
    steps = [record["step"] for record in trained.metrics("stopped")]
    assert steps == list(range(1, STEPS + 1))


def test_resume_with_another_zero_stage(trained: Trained) -> None:
    """States are kept as full tensors, whatever sharded them."""
    assert trained.two["zero1_from_zero3"]["status"] == 0
    torch.testing.assert_close(trained.losses("zero1_from_zero3"), trained.losses("zero3"), rtol=1e-5, atol=0)
    ema = (trained.adapter(run, "adapter_ema.safetensors") for run in ("zero1_from_zero3", "zero3"))
    torch.testing.assert_close(*ema, rtol=1e-4, atol=1e-6)


def test_across_two_one_two_ranks_every_clip_comes_once(trained: Trained) -> None:
    parts = [trained.two["cross 2"], trained.one["cross 1"], trained.two_again["cross 3"]]
    assert [part["status"] for part in parts] == [75, 75, 0]
    clips: list[str] = []
    positions: list[int] = []
    for part in parts:
        batches = [batch for by_rank in part["by_rank"] for batch in by_rank]
        for batch in sorted(batches, key=lambda batch: batch["positions"]):
            positions += batch["positions"]
            clips += batch["clip_ids"]
    assert positions == list(range(4 * CROSS_STEPS))
    # 28 samples are two epochs of 14 clips; the border of the epochs lies inside a step.
    for epoch in (clips[:14], clips[14:]):
        assert Counter(epoch) == Counter(SHORT_CLIPS)
    assert trained.metrics("cross")[-1]["position"] == 4 * CROSS_STEPS


def test_across_two_one_two_ranks_the_losses_are_those_of_one_run(trained: Trained) -> None:
    assert trained.two_again["cross 3"]["status"] == 0
    # The schedule of the learning rate is that of 7 steps: warm-up is common, the first updates too.
    losses = trained.losses("cross")
    assert len(losses) == CROSS_STEPS
    torch.testing.assert_close(losses[:3], trained.losses("two")[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses, trained.losses("cross_whole"), rtol=1e-5, atol=0)


def test_recomputation_draws_dropout_again_alike(trained: Trained) -> None:
    assert trained.two["dropout_kept"]["status"] == 0
    assert trained.losses("dropout") == trained.losses("dropout_kept")
    assert_equal_files(*(trained.run_dir(run) / "adapter.safetensors" for run in ("dropout", "dropout_kept")))


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(trained: Trained) -> None:
    assert trained.two["zero3"]["status"] == 0
    folder = trained.checkpoint("zero3", 15)
    keys = ["ema", "exp_avg", "exp_avg_sq", "lora"]
    files = [*(f"{key}.safetensors" for key in keys), "metrics.jsonl", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    names = None
    for key in keys:
        with safe_open(folder / f"{key}.safetensors", framework="pt") as file:
            assert names is None or names == sorted(file.keys())
            names = sorted(file.keys())
            assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in names)
            assert all(file.get_tensor(name).dtype == torch.float32 for name in names)
    state = json.loads((folder / "state.json").read_text())["state"]
    assert (state["step"], state["position"], state["num_updates"], state["num_skipped"]) == (15, 60, 15, 0)
    assert state["config"]["lora"]["rank"] == 8


def test_a_run_that_began_from_a_path_goes_on_when_its_command_is_repeated(trained: Trained) -> None:
    """As Slurm does it: the path must not throw the run back to where it began."""
    first, again = trained.one["from_path"], trained.one["from_path again"]
    assert (first["status"], again["status"]) == (75, 0)
    assert any("this run began there and goes on from step_00000002" in message for message in again["messages"])
    assert not any("is kept as superseded" in message for message in again["messages"])
    assert [record["step"] for record in trained.metrics("from_path")] == [1, 2, 3, 4]


def test_resume_never_and_other_options_are_refused(trained: Trained) -> None:
    assert trained.one["never"]["error"] is None
    assert "resume=never" in trained.one["never again"]["error"]
    error = trained.one["other seed"]["error"]
    assert "seed was 6, now 7" in error
    assert "lora.rank was 8, now 4" in error
