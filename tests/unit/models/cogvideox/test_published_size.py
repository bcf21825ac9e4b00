"""The full-size networks on the meta device: names, shapes and counts as published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model
from support import cogvideox_costs as costs
from torch.utils.flop_counter import FlopCounterMode

from exvideo_train.config.experiment import LORA_TARGETS
from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox import published
from exvideo_train.models.cogvideox.family import GRID
from exvideo_train.models.cogvideox.network import CogVideoXDiT
from exvideo_train.models.cogvideox.weights import config_from_fields


def _on_meta(fields: dict[str, Any]) -> CogVideoXDiT:
    with torch.device("meta"):
        return CogVideoXDiT(config_from_fields(fields, "published"))


@pytest.mark.parametrize("fields", [published.TRANSFORMER_5B, published.TRANSFORMER_2B], ids=["5b", "2b"])
def test_names_and_shapes_equal_diffusers(fields: dict[str, Any]) -> None:
    ours = _on_meta(fields)
    with torch.device("meta"):
        reference = CogVideoXTransformer3DModel(**{k: v for k, v in fields.items() if not k.startswith("_")})
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}


def test_5b_has_the_published_number_of_parameters() -> None:
    config = config_from_fields(published.TRANSFORMER_5B, "published")
    assert costs.num_parameters(config) == 5_570_283_072


def test_rank_64_lora_of_5b_has_the_released_adapters_size() -> None:
    model = _on_meta(published.TRANSFORMER_5B)
    targets = list(LORA_TARGETS)
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=64, target_modules=targets))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == 250_478_592
    assert costs.num_lora_parameters(model.config, 64, targets) == trained


@pytest.mark.parametrize("fields", [published.TRANSFORMER_5B, published.TRANSFORMER_2B], ids=["5b", "2b"])
@pytest.mark.parametrize(("num_frames", "tokens"), [(49, 17_776), (129, 44_776)])
def test_tokens_and_flops_at_full_size(fields: dict[str, Any], num_frames: int, tokens: int) -> None:
    geometry = Geometry(num_frames, 480, 720, 8)
    model = _on_meta(fields).requires_grad_(False)
    assert costs.num_tokens(model.config, geometry) == tokens
    _assert_flops_counted(model, geometry)


def _assert_flops_counted(model: CogVideoXDiT, geometry: Geometry) -> None:
    config = model.config
    latents = torch.empty(1, *GRID.shape_THW(geometry)[:1], 16, *GRID.shape_THW(geometry)[1:], device="meta")
    text = torch.empty(1, config.max_text_seq_length, config.text_embed_dim, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, torch.zeros(1, device="meta"), text)
    assert counter.get_total_flops() == costs.forward_flops(config, geometry)


def test_flops_of_lora_and_of_a_block_are_counted() -> None:
    geometry = Geometry(17, 64, 96, 8)
    fields = {**published.TRANSFORMER_5B, "num_attention_heads": 2, "num_layers": 2}
    model = _on_meta(fields)
    config, targets = model.config, ["attn1.to_q", "ff.net.2", "norm1.linear"]
    base = costs.forward_flops(config, geometry)
    one_more = costs.forward_flops(config_from_fields({**fields, "num_layers": 3}, "test"), geometry)
    assert one_more - base == costs.block_forward_flops(config, geometry)
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=3, target_modules=targets))
    latents = torch.empty(1, 5, 16, 8, 12, device="meta")
    text = torch.empty(1, 226, 4096, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        adapted(latents, torch.zeros(1, device="meta"), text)
    added = costs.lora_forward_flops(config, geometry, 3, targets)
    assert counter.get_total_flops() == base + added
