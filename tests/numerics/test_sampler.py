"""Our sampler against diffusers' CogVideoXPipeline with the same weights and noise."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from support.updates import randomise_b

from exvideo_train.extensions.adapter_file import write_adapter
from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_state
from exvideo_train.geometry import Geometry
from exvideo_train.models.registry import load_backbone
from exvideo_train.models.stages import SamplerSettings
from exvideo_train.sampling.pipeline import WITH_ADAPTER, WITHOUT_ADAPTER, Sampling, sample_videos

PROMPT = "a rabbit wakes"
RANK, ALPHA, TARGETS = 4, 10.0, ("attn1.to_q", "attn1.to_v", "ff.net.2", "norm1.linear")
LIBRARY = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}


@pytest.fixture(scope="module")
def adapter_path(tiny_model_5b, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    model = apply_lora(load_backbone(tiny_model_5b, torch.float32), LoraExtension(RANK, ALPHA, TARGETS), seed=6)
    randomise_b(model, seed=5)
    write_adapter(path, "diffusers", lora_state(model), RANK, ALPHA, TARGETS, {})
    return path


def reference_frames(model_path, geometry, settings, adapter_path=None, dtype=torch.float32):
    pipeline = CogVideoXPipeline.from_pretrained(model_path, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = LIBRARY[settings.scheduler].from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    if adapter_path is not None:
        pipeline.load_lora_weights(adapter_path)
    frames = pipeline(
        PROMPT,
        num_frames=geometry.num_frames,
        height=geometry.height,
        width=geometry.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(settings.seed),
        output_type="np",
    ).frames[0]
    return frames * 255.0


def our_frames(model_path, geometry, settings, dtype=torch.float32, **options):
    sampling = Sampling(model_path, geometry, settings, torch.device("cpu"), dtype, **options)
    (video,) = sample_videos(sampling, [PROMPT])
    return video.frames


def assert_frames_close(ours, reference):
    assert ours.dtype == np.uint8
    assert ours.shape == reference.shape
    assert reference.std() > 1.0, "a constant picture would prove nothing"
    assert np.abs(ours - reference).max() <= 1.0


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_129_frames_with_and_without_adapter(tiny_model_5b, adapter_path, scheduler):
    geometry, settings = Geometry(129, 64, 96, 8), SamplerSettings(scheduler, 3, 7.0, seed=6)
    frames = our_frames(tiny_model_5b, geometry, settings, adapter=LoraExtension.read(adapter_path), compare=True)
    assert_frames_close(frames[WITHOUT_ADAPTER], reference_frames(tiny_model_5b, geometry, settings))
    assert_frames_close(frames[WITH_ADAPTER], reference_frames(tiny_model_5b, geometry, settings, adapter_path))
    assert np.abs(frames[WITH_ADAPTER].astype(float) - frames[WITHOUT_ADAPTER]).max() > 3


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("size", [(9, 96, 64), (17, 48, 144)])
def test_other_sizes(tiny_model_5b, scheduler, size):
    geometry, settings = Geometry(*size, 8), SamplerSettings(scheduler, 5, 4.5, seed=1)
    frames = our_frames(tiny_model_5b, geometry, settings)
    assert_frames_close(frames[WITHOUT_ADAPTER], reference_frames(tiny_model_5b, geometry, settings))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_2b(tiny_model_2b, scheduler):
    geometry, settings = Geometry(17, 64, 96, 8), SamplerSettings(scheduler, 4, 7.0, seed=3)
    frames = our_frames(tiny_model_2b, geometry, settings)
    assert_frames_close(frames[WITHOUT_ADAPTER], reference_frames(tiny_model_2b, geometry, settings))


def test_guidance_off_and_one_by_one(tiny_model_5b):
    geometry = Geometry(9, 64, 96, 8)
    off = SamplerSettings("ddim", 3, 1.0, seed=3)
    assert_frames_close(
        our_frames(tiny_model_5b, geometry, off)[WITHOUT_ADAPTER], reference_frames(tiny_model_5b, geometry, off)
    )
    batched, one_by_one = (
        our_frames(tiny_model_5b, geometry, SamplerSettings("dpm", 3, 7.0, 3, batched_guidance=batched))
        for batched in (True, False)
    )
    assert np.abs(batched[WITHOUT_ADAPTER].astype(float) - one_by_one[WITHOUT_ADAPTER]).max() <= 1
