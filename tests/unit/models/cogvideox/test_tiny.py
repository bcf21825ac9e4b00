"""The tiny model is a whole CogVideoX: the published classes read it, and its numbers are not degenerate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from transformers import AutoTokenizer, T5EncoderModel, T5Tokenizer

from exvideo_train.errors import UserError
from exvideo_train.files import sha256_file
from exvideo_train.models.cogvideox.tiny import main, write_tiny_model


@pytest.mark.parametrize(
    ("variant", "scaling", "snr_shift", "dtype"),
    [("5b", 0.7, 1.0, torch.bfloat16), ("2b", 1.15258426, 3.0, torch.float16)],
)
def test_the_published_pipeline_samples_from_it(
    variant: str,
    scaling: float,
    snr_shift: float,
    dtype: torch.dtype,
    pristine_5b: Path,
    pristine_2b: Path,
) -> None:
    folder = pristine_5b if variant == "5b" else pristine_2b
    assert T5EncoderModel.from_pretrained(folder / "text_encoder", dtype="auto").dtype == dtype
    pipeline = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.config.scaling_factor == scaling
    assert pipeline.scheduler.config.snr_shift_scale == snr_shift
    for part in ("transformer", "text_encoder"):
        assert len(list((folder / part).glob("*-of-*.safetensors"))) >= 2
    frames = pipeline(
        "a large grey rabbit",
        num_frames=17,
        height=64,
        width=96,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert frames.shape == (1, 17, 64, 96, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0.1


def test_the_vae_compresses_8x8_pixels_and_4_frames(pristine_5b: Path) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(pristine_5b / "vae", torch_dtype=torch.float32)
    video = torch.rand(1, 3, 129, 64, 96) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(video).latent_dist
        decoded = vae.decode(posterior.mean).sample
    assert posterior.mean.shape == (1, 16, 33, 8, 12)
    assert decoded.shape == video.shape
    assert 0.1 < posterior.mean.std() < 10
    assert posterior.std.min() > 0.01
    # The latents depend on what is shown, frame by frame.
    assert posterior.mean.std(dim=2).min() > 1e-3


def test_the_tokenizer_is_t5s(pristine_5b: Path) -> None:
    for loader in (AutoTokenizer, T5Tokenizer):
        tokenizer = loader.from_pretrained(pristine_5b / "tokenizer")
        assert isinstance(tokenizer, T5Tokenizer)
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
        prompt = "A brown fox runs across the river, (quickly) & quietly: 100%!"
        tokens = tokenizer(prompt).input_ids
        assert tokenizer.decode(tokens, skip_special_tokens=True) == prompt
        assert tokens[-1] == 1
        assert 2 not in tokens
        assert tokenizer("").input_ids == [1]
        padded = tokenizer("a fox", padding="max_length", max_length=16, truncation=True).input_ids
        assert len(padded) == 16
        config = json.loads((pristine_5b / "text_encoder" / "config.json").read_text())
        assert max(tokens) < len(tokenizer) == config["vocab_size"]


def test_no_parameter_is_zero_or_one(pristine_5b: Path) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(pristine_5b, torch_dtype=torch.float32)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        for name, parameter in part.named_parameters():
            assert parameter.std() > 0.01, name


def _hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_seed_and_variant_decide_every_byte(tmp_path: Path, pristine_5b: Path) -> None:
    state = torch.random.get_rng_state()
    again = write_tiny_model(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), state)
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert _hashes(again) == _hashes(pristine_5b)
    assert {p.stat().st_mode & 0o777 for p in again.rglob("*") if p.is_file()} == {0o644}
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert _hashes(other)[weights] != _hashes(again)[weights]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "other"]


def test_writing_again_keeps_the_same_model_and_refuses_another(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _hashes(model_folder)
    assert write_tiny_model(model_folder) == model_folder
    with pytest.raises(UserError, match="remove it or name another folder"):
        write_tiny_model(model_folder, seed=5)
    assert main([str(model_folder), "--variant", "2b"]) == 2
    assert "remove it or name another folder" in capsys.readouterr().err
    assert _hashes(model_folder) == before
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"folder=.*file"):
        write_tiny_model(file)
    with pytest.raises(UserError, match="variant='7b'"):
        write_tiny_model(tmp_path / "new", "7b")  # type: ignore[arg-type]
