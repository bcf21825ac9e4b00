"""The trained tiny models of examples/: diffusers loads them whole, and makes the frames that sampling makes here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

from exvideo_train.geometry import Geometry
from exvideo_train.models.stages import SamplerSettings, decode_whole
from exvideo_train.sampling.pipeline import Sampler, Sampling
from exvideo_train.sampling.requests import VideoRequest
from exvideo_train.sampling.variants import make_variants

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "tiny"
KEPT = sorted(path.parent.name for path in EXAMPLES.glob("weights/*/config.json") if path.parent.name != "vae")
PROMPT = "a red ball sways over sand, the camera stands still"


@pytest.fixture(scope="module", params=KEPT)
def model(request, tmp_path_factory):
    sys.path.insert(0, str(EXAMPLES))
    from assemble import assemble

    yield assemble(request.param, tmp_path_factory.mktemp("models") / request.param)
    sys.path.remove(str(EXAMPLES))


def test_one_of_fixed_positions_is_kept():
    assert "sincos" in KEPT


@pytest.mark.parametrize("num_frames", [49, 129])
def test_the_frames_of_diffusers(model, num_frames):
    settings = SamplerSettings("ddim", num_inference_steps=3, guidance_scale=4.0)
    request = VideoRequest(PROMPT, "", 6, Geometry(num_frames, 48, 64, 8))
    (variant,) = make_variants((), False)
    sampler = Sampler(Sampling(model, settings, torch.float32, (variant,)), torch.device("cpu"), [request])
    frames_FHWC = decode_whole(sampler, sampler.draw(request, variant)).numpy()

    pipeline = CogVideoXPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = CogVideoXDDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing=settings.timestep_spacing
    )
    reference_FHWC = pipeline(
        PROMPT,
        num_frames=num_frames,
        height=48,
        width=64,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    ).frames[0]
    assert frames_FHWC.shape == reference_FHWC.shape == (num_frames, 48, 64, 3)
    assert reference_FHWC.std() > 0.05, "a constant picture would prove nothing"
    assert np.abs(frames_FHWC - 255.0 * reference_FHWC).max() <= 1.0
