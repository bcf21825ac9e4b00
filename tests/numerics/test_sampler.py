"""Our sampler against diffusers' CogVideoXPipeline with the same weights and noise."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from support.updates import randomise_b

from exvideo_train.extensions.adapter_file import write_adapter
from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_state
from exvideo_train.geometry import Geometry
from exvideo_train.models.registry import load_backbone
from exvideo_train.models.stages import SamplerSettings, decode_whole
from exvideo_train.sampling.pipeline import Sampler, Sampling
from exvideo_train.sampling.requests import VideoRequest
from exvideo_train.sampling.variants import WITH_ADAPTER, WITHOUT_ADAPTER, make_variants

PROMPT = "a rabbit wakes"
RANK, ALPHA, TARGETS = 4, 10.0, ("attn1.to_q", "attn1.to_v", "ff.net.2", "norm1.linear")
LIBRARY = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}


def write_random_adapter(path, model_path, targets=TARGETS, alpha=ALPHA, seed=5):
    model = apply_lora(load_backbone(model_path, torch.float32), LoraExtension(RANK, alpha, targets), seed=seed)
    randomise_b(model, seed=seed)
    write_adapter(path, "diffusers", lora_state(model), RANK, alpha, targets, {})
    return path


@pytest.fixture(scope="module")
def adapter_path(tiny_model_5b, tmp_path_factory):
    return write_random_adapter(tmp_path_factory.mktemp("adapter") / "adapter.safetensors", tiny_model_5b)


def reference_frames(model_path, geometry, settings, seed, strengths=(), dtype=torch.float32, **options):
    """What diffusers' pipeline makes; strengths: (adapter file, strength) pairs."""
    pipeline = CogVideoXPipeline.from_pretrained(model_path, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = LIBRARY[settings.scheduler].from_config(
        pipeline.scheduler.config, timestep_spacing=settings.timestep_spacing
    )
    names = [f"adapter_{number}" for number in range(len(strengths))]
    for name, (path, _) in zip(names, strengths, strict=True):
        pipeline.load_lora_weights(path, adapter_name=name)
    if names:
        pipeline.set_adapters(names, [strength for _, strength in strengths])
    frames = pipeline(
        PROMPT,
        num_frames=geometry.num_frames,
        height=geometry.height,
        width=geometry.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **options,
    ).frames[0]
    return frames * 255.0


def our_frames(model_path, geometry, settings, seed, adapter=(), compare=False, negative_prompt="", **options):
    """frames_FHWC by variant."""
    variants = make_variants(adapter, compare)
    sampling = Sampling(model_path, settings, torch.float32, variants, **options)
    request = VideoRequest(PROMPT, negative_prompt, seed, geometry)
    sampler = Sampler(sampling, torch.device("cpu"), [request])
    return {v.name: decode_whole(sampler, sampler.draw(request, v)).numpy() for v in variants}


def assert_frames_close(ours, reference):
    assert ours.dtype == np.uint8
    assert ours.shape == reference.shape
    assert reference.std() > 1.0, "a constant picture would prove nothing"
    assert np.abs(ours - reference).max() <= 1.0


SPACED = [(scheduler, spacing) for scheduler in LIBRARY for spacing in ("trailing", "linspace")]


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_129_frames_with_and_without_adapter(tiny_model_5b, adapter_path, scheduler):
    geometry, settings = Geometry(129, 64, 96, 8), SamplerSettings(scheduler, 3, 7.0)
    frames = our_frames(tiny_model_5b, geometry, settings, 6, adapter=[str(adapter_path)], compare=True)
    assert_frames_close(frames[WITHOUT_ADAPTER], reference_frames(tiny_model_5b, geometry, settings, 6))
    with_adapter = reference_frames(tiny_model_5b, geometry, settings, 6, [(adapter_path, 1.0)])
    assert_frames_close(frames[WITH_ADAPTER], with_adapter)
    assert np.abs(frames[WITH_ADAPTER].astype(float) - frames[WITHOUT_ADAPTER]).max() > 3


@pytest.mark.parametrize(("scheduler", "spacing"), SPACED)
def test_strengths_and_two_adapters_at_once(tiny_model_5b, adapter_path, tmp_path, scheduler, spacing):
    """Drawn one after the other by one backbone, in an order in which a strength that stuck would show."""
    other = write_random_adapter(tmp_path / "other.safetensors", tiny_model_5b, ("attn1.to_k", "ff.net.2"), 2.0, seed=9)
    geometry, settings = Geometry(9, 64, 96, 8), SamplerSettings(scheduler, 3, 7.0, timestep_spacing=spacing)
    entries = [f"{adapter_path}:{strength}" for strength in ("1.6", "0.4", "-1")]
    entries.insert(1, f"{adapter_path}:0.7+{other}:1.3")
    frames = our_frames(tiny_model_5b, geometry, settings, 2, adapter=entries, compare=True)
    expected = [[(adapter_path, 1.6)], [(adapter_path, 0.7), (other, 1.3)], [(adapter_path, 0.4)]]
    for ours, strengths in zip(frames.values(), [*expected, [(adapter_path, -1.0)], []], strict=True):
        assert_frames_close(ours, reference_frames(tiny_model_5b, geometry, settings, 2, strengths))
    made = list(frames.values())
    assert all(np.abs(one.astype(float) - two).max() > 2 for one, two in pairwise(made))


@pytest.mark.parametrize(("scheduler", "spacing"), SPACED)
def test_negative_prompt_and_timestep_spacing(tiny_model_5b, scheduler, spacing):
    geometry, settings = Geometry(17, 64, 96, 8), SamplerSettings(scheduler, 4, 7.0, timestep_spacing=spacing)
    frames = our_frames(tiny_model_5b, geometry, settings, 3, negative_prompt="a grey blur")[WITHOUT_ADAPTER]
    assert_frames_close(frames, reference_frames(tiny_model_5b, geometry, settings, 3, negative_prompt="a grey blur"))
    plain = our_frames(tiny_model_5b, geometry, settings, 3)[WITHOUT_ADAPTER]
    assert np.abs(plain.astype(float) - frames).max() > 2


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("size", [(9, 96, 64), (17, 48, 144)])
def test_other_sizes(tiny_model_5b, scheduler, size):
    geometry, settings = Geometry(*size, 8), SamplerSettings(scheduler, 5, 4.5)
    frames = our_frames(tiny_model_5b, geometry, settings, 1)
    assert_frames_close(frames[WITHOUT_ADAPTER], reference_frames(tiny_model_5b, geometry, settings, 1))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_2b(tiny_model_2b, scheduler):
    geometry, settings = Geometry(17, 64, 96, 8), SamplerSettings(scheduler, 4, 7.0)
    frames = our_frames(tiny_model_2b, geometry, settings, 3)
    assert_frames_close(frames[WITHOUT_ADAPTER], reference_frames(tiny_model_2b, geometry, settings, 3))


def test_guidance_off_and_one_by_one(tiny_model_5b):
    geometry = Geometry(9, 64, 96, 8)
    off = SamplerSettings("ddim", 3, 1.0)
    assert_frames_close(
        our_frames(tiny_model_5b, geometry, off, 3)[WITHOUT_ADAPTER], reference_frames(tiny_model_5b, geometry, off, 3)
    )
    batched, one_by_one = (
        our_frames(tiny_model_5b, geometry, SamplerSettings("dpm", 3, 7.0, batched_guidance=batched), 3)
        for batched in (True, False)
    )
    assert np.abs(batched[WITHOUT_ADAPTER].astype(float) - one_by_one[WITHOUT_ADAPTER]).max() <= 1


def test_positions_matter_beyond_the_length_of_the_base_alone(tiny_model_5b):
    settings = SamplerSettings("ddim", 2, 7.0)
    for num_frames, differs in ((49, False), (65, True)):
        geometry = Geometry(num_frames, 32, 48, 8)
        plain, other = (
            our_frames(tiny_model_5b, geometry, settings, 3, positions=positions)[WITHOUT_ADAPTER].astype(float)
            for positions in ("trained", "interpolated")
        )
        assert (np.abs(plain - other).max() > 0) == differs
