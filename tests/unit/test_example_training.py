"""What the tiny models are trained with: a loop that goes on exactly, Muon, the captions' tokens, the extension gap."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from exvideo_train.errors import UserError
from exvideo_train.models.registry import load_backbone


@pytest.fixture(autouse=True, scope="module")
def examples():
    folder = str(Path(__file__).resolve().parents[2] / "examples" / "tiny")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


class Killed(Exception):
    pass


def train_line(folder, num_steps, killed_at=None):
    """Averaged weights of a model of one matrix, trained to the identity."""
    import loop
    from optimizer import make_optimizers

    torch.manual_seed(0)
    model = nn.Linear(6, 4)

    def loss_of(step):
        if step == killed_at:
            raise Killed
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        return (model(inputs) - inputs[:, :4]).square().mean()

    loop.train(
        model,
        make_optimizers(model, 0.02, 1e-2, {"weight"}),
        loss_of,
        num_steps=num_steps,
        folder=folder,
        score=lambda scored: {"off": float((scored.weight - torch.eye(4, 6)).norm())},
        score_steps=50,
        ema_decay=0.9,
    )
    return model


def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    import loop

    whole = train_line(tmp_path / "whole", 200)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    with pytest.raises(Killed):
        train_line(tmp_path / "killed", 200, killed_at=120)
    # Lines that were written after the last state come again.
    with open(tmp_path / "killed" / loop.CURVE_NAME, "a") as curve:
        curve.write('{"step": 150, "loss": 1.0}\n')
    resumed = train_line(tmp_path / "killed", 200)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)
    steps = [line.split(",")[0] for line in (tmp_path / "killed" / loop.CURVE_NAME).read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in (50, 100, 150, 200)]
    assert (whole.weight - torch.eye(4, 6)).norm() < 0.5

    fresh = nn.Linear(6, 4)
    assert loop.load_average(tmp_path / "killed", fresh) == 200
    assert torch.equal(fresh.weight, whole.weight)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (16, 16)])
def test_muon_makes_all_directions_about_equally_strong(shape):
    from optimizer import orthogonalised

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert 0.6 < values.min() <= values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonalised(matrix).flatten(), (left @ right).flatten(), 0) > 0.97


def test_each_word_of_the_captions_is_a_token(tmp_path):
    from captions import TEXT_LENGTH, all_captions, embed, write_text_encoder

    from exvideo_train.models.cogvideox.encoders import TextEncoder

    write_text_encoder(tmp_path)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_text_encoder(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written
    encoder = TextEncoder(tmp_path, "cpu", torch.float32, TEXT_LENGTH)
    captions = all_captions()
    assert len(captions) == 6 * 3 * 4 * 5 * 3
    assert not any(encoder.num_tokens_cut(caption) for caption in captions)
    tokens = encoder._tokenizer(captions[0]).input_ids
    words = captions[0].replace(",", " ,").split()
    assert encoder._tokenizer.convert_ids_to_tokens(tokens) == [
        *(word if word == "," else f"▁{word}" for word in words),
        "</s>",
    ]
    assert embed(tmp_path, captions[:1])[captions[0]].shape == (TEXT_LENGTH, 64)


def test_the_gap_is_a_ratio_of_means_with_an_interval():
    from gap import gap_with_interval

    losses = np.ones((8, 33))
    losses[:, 13:] = 1.5
    assert gap_with_interval(losses) == (1.5, 1.5, 1.5)
    losses[0, 13:] = 9.5
    gap, low, high = gap_with_interval(losses)
    assert low < gap < high
    assert gap == pytest.approx(2.5)


def test_what_is_trained_is_a_model_in_the_published_layout(tmp_path):
    from assemble import write_model
    from captions import write_text_encoder
    from latents import Latents, encoded
    from train_dit import make_dit, transformer_config
    from train_vae import clip, make_vae

    torch.manual_seed(0)
    vae = make_vae()
    vae.save_pretrained(tmp_path / "parts" / "vae")
    write_text_encoder(tmp_path / "parts")
    network, config = make_dit(transformer_config("rotary", 49)), transformer_config("rotary", 49)
    write_model(tmp_path / "parts", tmp_path / "model", network, config)

    loaded = load_backbone(tmp_path / "model", torch.bfloat16)
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name
    moments = encoded(tmp_path / "model", tmp_path / "cache", 5, 3, 9)
    assert moments.shape == (3, 32, 3, 6, 8)
    with torch.inference_mode():
        alone = vae.encode(clip(7, 9)[None]).latent_dist.parameters[0]
    assert (moments[2] - alone).abs().max() < 0.05
    # Kept on disk: the second time it is read.
    (chunk,) = (tmp_path / "cache").rglob("*.safetensors")
    written = chunk.stat().st_mtime_ns
    latents = Latents(tmp_path / "model", tmp_path / "cache", 5, 3, 9)
    assert chunk.stat().st_mtime_ns == written
    assert latents.sample(0, torch.zeros(latents.shape_TCHW)).shape == latents.shape_TCHW == (3, 16, 6, 8)


def test_only_kept_models_are_assembled_and_nothing_is_overwritten(tmp_path):
    from assemble import assemble

    with pytest.raises(UserError, match="known are"):
        assemble("learned", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_probe_is_told_where_the_shape_is():
    from clips import draw_scene, render
    from probe import APART, WORDS, truth

    scene = draw_scene(4)
    words, place = truth(scene, 20, 3)
    assert {name: WORDS[name][int(index[0])] for name, index in words.items()} == {
        name: getattr(scene, name) for name in WORDS
    }
    # The difference of two frames lies where the shape is in one or the other.
    here, later = render(scene, 2, fps=8 / APART, first=20).astype(float)
    assert np.array_equal(render(scene, 30)[20], here)
    row, column = (place[0, :2] * 10).round().int().tolist()
    colour = np.array(here[row, column])
    assert (
        np.abs(colour - later[row + round(10 * float(place[0, 2])), column + round(10 * float(place[0, 3]))]).max() < 40
    )
