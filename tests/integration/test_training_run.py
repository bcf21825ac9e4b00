"""What a training process is made of, and what it does when files are bad or the disk is full."""

from __future__ import annotations

import json

import pytest
import torch
from support.trained import FORMS, NAN_CLIP, SHORT_CLIPS, Trained
from support.wandb_file import read_history

from exvideo_train.extensions.adapter_file import read_adapter
from exvideo_train.training.checkpoint import list_checkpoints, load_checkpoint

# What encodes: the training process needs none of it. (PEFT imports the base classes of transformers.)
ENCODERS = (
    "transformers.models.t5.modeling_t5",
    "diffusers.models.autoencoders",
    "diffusers.pipelines",
    "decord",
    "av",
    "cv2",
)


def test_no_encoder_and_no_video_reader_is_imported(trained: Trained) -> None:
    modules = trained.one["bf16"]["modules"]
    assert "deepspeed" in modules
    loaded = [name for name in modules if any(name == part or name.startswith(part + ".") for part in ENCODERS)]
    assert loaded == []


def test_adapter_is_fp32_and_the_frozen_backbone_bf16(trained: Trained) -> None:
    assert trained.one["bf16"]["dtypes"] == {"trained": ["torch.float32"], "frozen": ["torch.bfloat16"]}


def test_frozen_weights_do_not_move(trained: Trained) -> None:
    result = trained.one["bf16"]
    assert result["status"] == 0
    assert result["frozen_before"] == result["frozen_after"]


def test_exported_adapter_loads(trained: Trained) -> None:
    assert trained.one["bf16"]["status"] == 0
    # The run was continued to step 6.
    adapter = read_adapter(trained.run_dir("bf16") / "adapter.safetensors")
    assert (adapter.rank, adapter.alpha) == (8, 8.0)
    assert int(adapter.provenance["steps"]) == 6
    checkpoint = load_checkpoint(trained.checkpoint("bf16", 6)).tensors("lora")
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in checkpoint.items())


def test_training_begins_where_the_run_that_wrote_the_file_ended(trained: Trained) -> None:
    assert trained.one["begun_from_file"]["status"] == 0
    begun, ended = trained.validations("begun_from_file")[0], trained.validations("held_out_1")[-1]
    assert begun["loss"] == ended["loss"] != trained.validations("held_out_1")[0]["loss"]


def test_more_steps_can_be_asked_for_later(trained: Trained) -> None:
    assert trained.one["bf16_resumed"]["status"] == 0
    assert any("max_steps was 3, now 6" in message for message in trained.one["bf16_resumed"]["messages"])
    assert [record["step"] for record in trained.metrics("bf16")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["nan_1", "nan_2", "nan_3", "nan_offloaded"])
def test_a_non_finite_gradient_skips_the_update(trained: Trained, name: str) -> None:
    result = trained.two[name]
    assert result["status"] == 0
    bad = {batch["step"] for rank in result["by_rank"] for batch in rank if NAN_CLIP in batch["clip_ids"]}
    assert bad, "the clip comes up in 6 steps of 4"
    assert (result["num_skipped"], result["num_updates"]) == (len(bad), 6 - len(bad))
    for record in trained.metrics(name):
        if record["step"] in bad:
            assert NAN_CLIP in record["clip_ids"]
            assert len(record["clip_ids"]) == 4, "the clips of all ranks are named"
        else:
            assert record["loss"] > 0
            assert "clip_ids" not in record
    assert trained.metrics(name)[-1]["skipped_updates"] == len(bad)
    assert any("update skipped" in message and NAN_CLIP in message for message in result["messages"])
    assert all(bool(tensor.isfinite().all()) for tensor in trained.adapter(name).values())


def test_a_skipped_update_leaves_weights_and_moments_alone(trained: Trained) -> None:
    """All forms skip the same update, and agree before and after it."""
    losses = {name: trained.losses(name) for name in ("nan_1", "nan_2", "nan_3", "nan_offloaded") if trained.two}
    for name in losses:
        finite = [(a, b) for a, b in zip(losses[name], losses["nan_2"], strict=True) if b is not None]
        assert 4 <= len(finite) < 6
        torch.testing.assert_close(*zip(*finite, strict=True), rtol=1e-5, atol=0)


def test_too_many_non_finite_steps_in_a_row_stop_the_run(trained: Trained) -> None:
    result = trained.one["all_nan"]
    assert "4 updates in a row had a non-finite gradient" in result["error"]
    assert len(trained.metrics("all_nan")) == 4
    assert result["num_updates"] == 0


@pytest.mark.parametrize(("name", "step", "good"), [("spoilt", 6, 3), ("spoilt_when_saved", 3, 2)])
def test_weights_that_are_not_finite_stop_the_run_and_reach_no_checkpoint(
    trained: Trained, name: str, step: int, good: int
) -> None:
    result = (trained.two if name == "spoilt" else trained.one)[name]
    assert result["status"] is None
    assert f"step {step}: " in result["error"]
    assert " is not finite (NaN or infinity) and is not saved" in result["error"]
    assert f"the last good checkpoint is {trained.checkpoint(name, good)}" in result["error"]
    checkpoints = list_checkpoints(trained.run_dir(name))
    assert checkpoints[-1] == trained.checkpoint(name, good)
    tensors = load_checkpoint(checkpoints[-1]).tensors("lora")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert not (trained.run_dir(name) / "adapter.safetensors").exists()


def test_loss_spikes_are_logged_with_their_clips(trained: Trained) -> None:
    result = trained.one["spikes"]
    assert result["status"] == 0
    mean, spikes = None, 0
    for record in trained.metrics("spikes"):
        if mean is not None and record["loss"] > 1.01 * mean:
            spikes += 1
            assert len(record["clip_ids"]) == 4
            assert any(f"step {record['step']}: loss spike" in message for message in result["messages"])
        else:
            assert "clip_ids" not in record
        mean = record["loss"] if mean is None else 0.98 * mean + 0.02 * record["loss"]
    assert 0 < spikes < 5


def test_loss_spikes_are_found_between_log_steps_too(trained: Trained) -> None:
    def spikes(name: str) -> list[str]:
        return [message for message in trained.one[name]["messages"] if "loss spike" in message]

    assert trained.one["spikes_logged_late"]["status"] == 0
    assert spikes("spikes_logged_late") == spikes("spikes") != []
    # Every fourth step, and the last one.
    assert [record["step"] for record in trained.metrics("spikes_logged_late")] == [4, 6]


def test_corrupt_latents_are_replaced_by_the_next_in_order(trained: Trained) -> None:
    result = trained.one["corrupt"]
    assert result["status"] == 0
    corrupt = {SHORT_CLIPS[2], SHORT_CLIPS[3]}
    seen = {clip_id for batch in result["batches"] for clip_id in batch["clip_ids"]}
    assert seen == set(SHORT_CLIPS) - corrupt
    assert trained.metrics("corrupt")[-1]["corrupt_clips"] == 2
    words = "damaged or unreadable, replaced by the next in order"
    said = [message for message in result["messages"] if words in message]
    told = [clip_id for message in said for clip_id in message.rsplit(": ", 1)[1].split(", ")]
    assert sorted(told) == sorted(corrupt)


def test_too_many_corrupt_latents_stop_the_run(trained: Trained) -> None:
    error = trained.one["too_corrupt"]["error"]
    assert "data.max_corrupt_clips=1" in error
    assert "exvideo_train.latents verify" in error


def test_a_full_disk_while_saving_costs_only_that_checkpoint(trained: Trained) -> None:
    result = trained.one["disk_full"]
    assert result["status"] == 0
    failed = [message for message in result["messages"] if "checkpoint not written" in message]
    assert len(failed) == 2, failed
    assert all("the previous one stays valid" in message for message in failed)
    assert [path.name for path in list_checkpoints(trained.run_dir("disk_full"))] == ["step_00000005", "step_00000006"]
    folder = trained.run_dir("disk_full") / "checkpoints"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    for path in list_checkpoints(trained.run_dir("disk_full")):
        load_checkpoint(path)


def test_jsonl_wandb_and_tensorboard_get_the_same_figures(trained: Trained) -> None:
    assert trained.one["logged"]["status"] == 0
    records = trained.metrics("logged")
    assert [record["step"] for record in records] == [2, 4]
    assert set(records[0]["speed"]["phase_seconds"]) == {"data", "forward", "backward", "optimizer", "other"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.run_dir("logged") / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [2, 4]
    assert [event.value for event in scalars] == pytest.approx([record["loss"] for record in records])
    assert "speed/phase_seconds/forward" in events.Tags()["scalars"]
    offline = list((trained.run_dir("logged") / "wandb").glob("offline-run-*/*.wandb"))
    assert len(offline) == 1
    history = read_history(offline[0])
    for name in ("loss", "grad_norm", "lr"):
        assert [step[name] for step in history] == pytest.approx([record[name] for record in records])
    speeds = [step["speed/phase_seconds/forward"] for step in history]
    assert speeds == pytest.approx([record["speed"]["phase_seconds"]["forward"] for record in records])


@pytest.mark.parametrize("name", [name for name in FORMS if name != "plain"])
def test_other_forms_of_the_same_computation_give_the_same_losses(trained: Trained, name: str) -> None:
    assert trained.one[name]["status"] == 0
    torch.testing.assert_close(trained.losses(name), trained.losses("plain"), rtol=1e-5, atol=0)
    torch.testing.assert_close(trained.grad_norms(name), trained.grad_norms("plain"), rtol=1e-4, atol=0)


def test_metrics_are_strict_json(trained: Trained) -> None:
    """NaN is no JSON; other programs read this file."""
    assert trained.one["all_nan"]["error"]

    def refuse(word: str) -> float:
        raise ValueError(word)

    for line in (trained.run_dir("all_nan") / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None
