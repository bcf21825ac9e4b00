"""The DiT against diffusers', with the same random weights: outputs, LoRA gradients, positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from peft import LoraConfig, get_peft_model
from torch import Tensor

from exvideo_train.config.experiment import LORA_TARGETS
from exvideo_train.models.cogvideox import published
from exvideo_train.models.cogvideox.network import CogVideoXDiT
from exvideo_train.models.cogvideox.positions import TimeAxis, rotary_tables, sincos_embedding
from exvideo_train.models.cogvideox.tiny import randomize
from exvideo_train.models.cogvideox.weights import config_from_fields

# Small, but with the published proportions: several heads and blocks, text wider than a head, 2x2 patches.
SMALL: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "num_layers": 3,
    "time_embed_dim": 24,
    "text_embed_dim": 40,
    "max_text_seq_length": 13,
    "sample_height": 8,
    "sample_width": 12,
}
PUBLISHED = {"5b": published.TRANSFORMER_5B, "2b": published.TRANSFORMER_2B}


def fields_of(variant: str, **changes: Any) -> dict[str, Any]:
    """Published fields at the small size, without the underscored ones."""
    fields = {**PUBLISHED[variant], **SMALL, **changes}
    return {name: value for name, value in fields.items() if not name.startswith("_")}


def make_pair(variant: str, **changes: Any) -> tuple[CogVideoXDiT, CogVideoXTransformer3DModel]:
    torch.manual_seed(0)
    fields = fields_of(variant, **changes)
    reference = CogVideoXTransformer3DModel(**fields)
    randomize(reference)
    ours = CogVideoXDiT(config_from_fields(fields, "test"))
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def reference_rotary(fields: dict[str, Any], num_latent_frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cos and sin of the video tokens as diffusers' pipeline prepares them; height and width in latents."""
    patch = fields["patch_size"]
    grid = (height // patch, width // patch)
    crops = get_resize_crop_region_for_grid(grid, fields["sample_width"] // patch, fields["sample_height"] // patch)
    return get_3d_rotary_pos_embed(fields["attention_head_dim"], crops, grid, num_latent_frames)


def run_reference(reference: Any, latents_BTCHW: Tensor, timesteps_B: Tensor, text_BLC: Tensor) -> Tensor:
    """Forward of diffusers' network, or of PEFT's wrapping of it, with the tables its pipeline would pass."""
    fields = dict(reference.config)
    rotary = None
    if fields["use_rotary_positional_embeddings"]:
        _, num_latent_frames, _, height, width = latents_BTCHW.shape
        rotary = reference_rotary(fields, num_latent_frames, height, width)
    output: Tensor = reference(latents_BTCHW, text_BLC, timesteps_B, image_rotary_emb=rotary, return_dict=False)[0]
    return output


def draw_inputs(
    fields: Any, num_latent_frames: int, height: int, width: int, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, num_latent_frames, 16, height, width, generator=generator)
    text = torch.randn(batch, fields.max_text_seq_length, fields.text_embed_dim, generator=generator)
    return latents, torch.tensor([999, 17][:batch]), text


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return ((value - reference).abs().max() / reference.abs().max()).item()


# Latent frames of 49 and of 129 video frames at the base size; then other sizes, higher, wider, larger and smaller.
GEOMETRIES = [(13, 8, 12), (33, 8, 12), (33, 12, 8), (3, 20, 6), (5, 6, 22), (2, 24, 44), (1, 2, 2)]


@pytest.mark.parametrize("variant", ["5b", "2b"])
@pytest.mark.parametrize(("num_latent_frames", "height", "width"), GEOMETRIES)
def test_output_equals_diffusers(variant: str, num_latent_frames: int, height: int, width: int) -> None:
    ours, reference = make_pair(variant)
    inputs = draw_inputs(ours.config, num_latent_frames, height, width)
    with torch.no_grad():
        velocity, expected = ours(*inputs), run_reference(reference, *inputs)
    assert velocity.shape == inputs[0].shape
    assert relative_error(velocity, expected) < 1e-5


@pytest.mark.parametrize("variant", ["5b", "2b"])
@pytest.mark.parametrize(("num_latent_frames", "height", "width"), [(13, 8, 12), (33, 8, 12), (3, 20, 6)])
def test_lora_gradients_equal_diffusers(variant: str, num_latent_frames: int, height: int, width: int) -> None:
    ours, reference = make_pair(variant)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=LORA_TARGETS, init_lora_weights=False)
    ours_lora, reference_lora = get_peft_model(ours, settings), get_peft_model(reference, settings)
    named = {name: p for name, p in ours_lora.named_parameters() if p.requires_grad}
    named_reference = {name: p for name, p in reference_lora.named_parameters() if p.requires_grad}
    assert list(named) == list(named_reference)
    assert len(named) == 2 * len(LORA_TARGETS) * ours.config.num_layers
    with torch.no_grad():
        for name, parameter in named.items():
            named_reference[name].copy_(parameter)
    inputs = draw_inputs(ours.config, num_latent_frames, height, width)
    target = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    torch.nn.functional.mse_loss(ours_lora(*inputs), target).backward()
    torch.nn.functional.mse_loss(run_reference(reference_lora, *inputs), target).backward()
    for name, parameter in named.items():
        gradient, expected = parameter.grad, named_reference[name].grad
        assert gradient is not None
        assert expected is not None
        assert expected.abs().max() > 0, name
        assert relative_error(gradient, expected) < 1e-5, name


@pytest.mark.parametrize(
    ("num_latent_frames", "height", "width"),
    [(13, 60, 90), (33, 60, 90), (65, 60, 90), (33, 90, 60), (9, 32, 32), (5, 96, 170), (5, 44, 62)],
)
def test_rotary_tables_equal_diffusers_at_full_size(num_latent_frames: int, height: int, width: int) -> None:
    fields = fields_of("5b", sample_height=60, sample_width=90, attention_head_dim=64)
    cos, sin = rotary_tables(
        num_text_tokens=226,
        grid_THW=(num_latent_frames, height // 2, width // 2),
        base_HW=(30, 45),
        head_dim=64,
        device=torch.device("cpu"),
    )
    expected_cos, expected_sin = reference_rotary(fields, num_latent_frames, height, width)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos[:226], torch.ones(226, 64))
    assert torch.equal(sin[:226], torch.zeros(226, 64))
    # The largest angle is 64 rad, where fp32 steps are 8e-6.
    torch.testing.assert_close(cos[226:], expected_cos, rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[226:], expected_sin, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("num_latents", "slowed"), [(13, None), (33, 0.9 * 2 * math.pi / 33), (65, 0.9 * 2 * math.pi / 65)]
)
def test_riflex_slows_the_second_frequency_of_the_5b_alone(num_latents: int, slowed: float | None) -> None:
    """As published for CogVideoX-5B: k = 2, and 0.9 of a period over the video (arXiv 2502.15894)."""
    options = {"num_text_tokens": 3, "grid_THW": (num_latents, 2, 3), "base_HW": (2, 3), "head_dim": 64}
    cos, sin = rotary_tables(**options, device=torch.device("cpu"), time_axis=TimeAxis("riflex", num_base=13))
    frequencies = 1.0 / 10_000 ** (torch.arange(0, 16, 2).double() / 16)
    if slowed is not None:
        frequencies[1] = slowed
    angles = torch.outer(torch.arange(num_latents).double(), frequencies).repeat_interleave(2, dim=1)
    of_time = slice(0, 16)
    torch.testing.assert_close(cos[3::6, of_time].double(), angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[3::6, of_time].double(), angles.sin(), rtol=0, atol=1e-5)
    plain_cos, _ = rotary_tables(**options, device=torch.device("cpu"))
    assert torch.equal(cos[:, 16:], plain_cos[:, 16:])


def test_interpolated_positions_lie_within_the_base_models_range() -> None:
    options = {"num_text_tokens": 0, "base_HW": (2, 3), "head_dim": 64, "device": torch.device("cpu")}
    long, _ = rotary_tables(**options, grid_THW=(39, 2, 3), time_axis=TimeAxis("interpolated", num_base=13))
    base, _ = rotary_tables(**options, grid_THW=(13, 2, 3))
    # Every third frame of a video three times as long stands where the base's frames stand.
    torch.testing.assert_close(long.unflatten(0, (39, 6))[::3], base.unflatten(0, (13, 6)), rtol=0, atol=1e-5)
    sincos = {"num_text_tokens": 0, "num_channels": 96, "spatial_scale": 1.0, "device": torch.device("cpu")}
    long = sincos_embedding(**sincos, temporal_scale=2.0, grid_THW=(26, 2, 3), time_axis=TimeAxis("interpolated", 13))
    base = sincos_embedding(**sincos, temporal_scale=2.0, grid_THW=(13, 2, 3))
    torch.testing.assert_close(long.unflatten(0, (26, 6))[::2], base.unflatten(0, (13, 6)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("grid_THW", "scale_H", "scale_T"), [((13, 30, 45), 1.875, 1.0), ((33, 9, 4), 1.0, 2.5)])
def test_sincos_embedding_equals_diffusers(grid_THW: tuple[int, int, int], scale_H: float, scale_T: float) -> None:
    T, H, W = grid_THW
    ours = sincos_embedding(
        num_text_tokens=7,
        grid_THW=grid_THW,
        num_channels=96,
        spatial_scale=scale_H,
        temporal_scale=scale_T,
        device=torch.device("cpu"),
    )
    expected = get_3d_sincos_pos_embed(96, (W, H), T, scale_H, scale_T).flatten(0, 1).float()
    assert torch.equal(ours[:7], torch.zeros(7, 96))
    torch.testing.assert_close(ours[7:], expected, rtol=0, atol=1e-6)


def test_a_position_error_would_be_seen() -> None:
    """Shifting the last latent frame by one moves the output by far more than the tolerance."""
    ours, _ = make_pair("5b")
    latents, timesteps, text = draw_inputs(ours.config, 5, 8, 12)
    with torch.no_grad():
        velocity = ours(latents, timesteps, text)
        turned = ours(latents.roll(1, dims=1), timesteps, text).roll(-1, dims=1)
    assert relative_error(turned, velocity) > 1e-3
