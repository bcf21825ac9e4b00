"""Validation, the extension gap and the moving average, against computations of their own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.store import LONG
from support.trained import Trained

from exvideo_train.latents.store import LatentStore
from exvideo_train.models.cogvideox.objective import noise_levels
from exvideo_train.models.registry import load_backbone
from exvideo_train.training.curves import curves_figure
from exvideo_train.training.draws import draw
from exvideo_train.training.order import split_held_out
from exvideo_train.training.validation import _VALIDATION_SEED

BASE_LATENT_FRAMES = 13


@torch.no_grad()
def test_extension_gap_before_training_by_hand(trained: Trained) -> None:
    assert trained.one["held_out_1"]["status"] == 0
    recorded = trained.validations("held_out_1")[0]
    model = load_backbone(trained.model, torch.float32, torch.device("cpu"))
    store, levels = LatentStore.open(trained.latents), noise_levels(trained.model)
    _, held_out = split_held_out(store.clip_ids(LONG), 3)
    assert recorded["num_clips"] == 3
    by_frame = []
    for number, clip_id in enumerate(held_out):
        stored = store.read(clip_id, LONG)
        mean, log_variance = stored.tensors["moments"].float().transpose(0, 1).chunk(2, dim=1)
        for band, timestep in enumerate((125, 375, 625, 875)):
            random = draw(_VALIDATION_SEED, 4 * number + band, mean.shape, 1000, 0.0)
            latents = store.normalisation.factor_C[0] * (mean + (log_variance / 2).exp() * random.posterior_noise_TCHW)
            time = torch.tensor([timestep])
            signal, noise = levels.signal_L[timestep].float(), levels.noise_L[timestep].float()
            noisy = signal * latents + noise * random.noise_TCHW
            velocity = signal * random.noise_TCHW - noise * latents
            error = model(noisy[None], time, stored.tensors["text"][None])[0] - velocity
            by_frame.append(error.square().mean(dim=(1, 2, 3)))
    by_position = torch.stack(by_frame).mean(dim=0)
    torch.testing.assert_close(torch.tensor(recorded["by_position"]), by_position, rtol=1e-5, atol=0)
    gap = by_position[BASE_LATENT_FRAMES:].mean() / by_position[:BASE_LATENT_FRAMES].mean()
    assert recorded["extension_gap"] == pytest.approx(float(gap), rel=1e-5)
    assert list(recorded["by_timestep"]) == ["125", "375", "625", "875"]
    assert recorded["loss"] == pytest.approx(float(by_position.mean()), rel=1e-5)


@pytest.mark.parametrize("key", ["validation", "validation_ema"])
def test_validation_is_the_same_on_every_number_of_ranks(trained: Trained, key: str) -> None:
    assert trained.one["held_out_1"]["status"] == 0
    assert trained.two["held_out_2"]["status"] == trained.two["held_out_3"]["status"] == 0
    expected = trained.validations("held_out_1", key)
    assert len(expected) == (3 if key == "validation" else 2)
    for name in ("held_out_2", "held_out_3"):
        scored = trained.validations(name, key)
        assert len(scored) == len(expected)
        for record, reference in zip(scored, expected, strict=True):
            torch.testing.assert_close(record, reference, rtol=1e-5, atol=0)


def test_validation_changes_nothing_in_training(trained: Trained) -> None:
    """The moving average is swapped in and out again; no random number is drawn from training's."""
    assert trained.one["held_out_none"]["status"] == 0
    assert trained.losses("held_out_1") == trained.losses("held_out_none")
    for file in ("adapter.safetensors", "adapter_ema.safetensors"):
        scored, plain = trained.adapter("held_out_1", file), trained.adapter("held_out_none", file)
        assert all(torch.equal(scored[name], plain[name]) for name in plain)
    first, last = trained.validations("held_out_1")[0], trained.validations("held_out_1")[-1]
    assert last["loss"] < first["loss"], "the held-out loss falls"
    assert (trained.run_dir("held_out_1") / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_held_out_clips_are_told_and_left_out(trained: Trained) -> None:
    result = trained.one["held_out_damaged"]
    assert result["status"] == 0
    assert any(m.startswith(f"validation goes on without {trained.held_out[0]}: ") for m in result["messages"])
    scores, whole = trained.validations("held_out_damaged"), trained.validations("held_out_1")
    assert [score["num_clips"] for score in scores] == [2, 2, 2]
    assert all(score["loss"] != other["loss"] for score, other in zip(scores, whole, strict=True))


def test_a_stop_saves_before_it_validates_and_the_resumed_run_validates(trained: Trained) -> None:
    assert trained.one["held_out_stopped"]["status"] == 75
    assert trained.one["held_out_stopped again"]["status"] == 0
    said = trained.one["held_out_stopped"]["messages"]
    assert not any(message.startswith("step 2: validation") for message in said)
    assert trained.validations("held_out_stopped") == trained.validations("held_out_1")
    assert trained.validations("held_out_stopped", "validation_ema") == trained.validations(
        "held_out_1", "validation_ema"
    )


def test_curves_show_what_was_recorded(trained: Trained) -> None:
    assert trained.one["held_out_1"]["status"] == 0
    loss_axes, gap_axes, position_axes = curves_figure(trained.records("held_out_1")).axes
    scores, averages = trained.validations("held_out_1"), trained.validations("held_out_1", "validation_ema")
    assert list(loss_axes.lines[0].get_ydata()) == trained.losses("held_out_1")
    assert list(gap_axes.lines[0].get_xdata()) == [0, 2, 4]
    assert list(gap_axes.lines[0].get_ydata()) == [score["extension_gap"] for score in scores]
    assert list(gap_axes.lines[1].get_ydata()) == [score["extension_gap"] for score in averages]
    assert list(position_axes.lines[-1].get_ydata()) == scores[-1]["by_position"]


@pytest.mark.parametrize("name", ["held_out_1", "held_out_2", "held_out_3"])
def test_moving_average_by_hand(trained: Trained, name: str) -> None:
    assert trained.one["held_out_1"]["status"] == trained.two["held_out_3"]["status"] == 0
    average: dict[str, torch.Tensor] = {}
    for step in range(1, 5):
        folder = trained.checkpoint(name, step)
        weights = load_file(folder / "lora.safetensors")
        if step == 1:
            # Before the first update B is zero, and A has had no gradient yet but weight decay; read it off the file.
            average = first_average(weights, load_file(folder / "ema.safetensors"))
        else:
            average = {key: 0.5 * average[key] + 0.5 * weights[key] for key in weights}
        torch.testing.assert_close(load_file(folder / "ema.safetensors"), average, rtol=1e-6, atol=1e-9)
    exported = trained.adapter(name, "adapter_ema.safetensors")
    torch.testing.assert_close({f"transformer.{key}": tensor for key, tensor in average.items()}, exported)


def first_average(weights: dict[str, torch.Tensor], ema: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The average after one update; checked where the start is known: B begins at zero."""
    for name, tensor in weights.items():
        if name.endswith("lora_B.weight"):
            torch.testing.assert_close(ema[name], 0.5 * tensor)
    return ema
