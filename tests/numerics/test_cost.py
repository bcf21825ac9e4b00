"""The FLOPs that meters and plans use against FlopCounterMode on real tensors, and a plan's traces against depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.cogvideox_costs import attention_flops, forward_flops, lora_forward_flops
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from exvideo_train.config.experiment import LORA_TARGETS, MemoryConfig, Recompute
from exvideo_train.extensions.lora import LoraExtension
from exvideo_train.geometry import Geometry
from exvideo_train.models.registry import FAMILIES
from exvideo_train.parallel.activation_checkpointing import HostMemory
from exvideo_train.parallel.mesh import Mesh
from exvideo_train.parallel.parallelize import parallelize
from exvideo_train.planning.trace import CostCounter, TracedKernel, Work, trace_blocks, trace_step
from exvideo_train.training.flops import empty_inputs, step_flops

FAMILY = FAMILIES[0]
ATEN = torch.ops.aten
# FlopCounterMode knows the GPU's fused attention by name but not the CPU's: the same work under another name.
CPU_ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}
GEOMETRIES = [Geometry(9, 32, 48, 8), Geometry(25, 48, 32, 8), Geometry(129, 16, 16, 8)]
NOT_NORM1 = [name for name in LORA_TARGETS if name != "norm1.linear"]


def lora_of(rank: int, targets: Sequence[str] = LORA_TARGETS) -> LoraExtension:
    return LoraExtension(rank, rank, tuple(targets))


def small_config(rotary: bool, num_layers: int = 5) -> Any:
    published = FAMILY.published_config("zai-org/CogVideoX-5b" if rotary else "zai-org/CogVideoX-2b")
    return dataclasses.replace(
        published,
        num_layers=num_layers,
        num_attention_heads=2,
        attention_head_dim=16,
        time_embed_dim=8,
        text_embed_dim=12,
        max_text_seq_length=10,
    )


class NoHost(HostMemory):
    """Counts what is put away, and keeps it where no meter sees it."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def put(self, tensor: torch.Tensor) -> Any:
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor.detach().numpy().copy()

    def get(self, token: Any) -> torch.Tensor:
        return torch.empty(token.shape).copy_(torch.from_numpy(token))


def on_cpu(
    config: Any, lora: LoraExtension, recompute: Recompute, host: NoHost | None = None, **memory: Any
) -> nn.Module:
    """The network as a step runs it, fp32, with real weights."""
    network = FAMILY.build(config)
    lora.attach(network, seed=0)
    mesh = Mesh(0, 1, 1, torch.device("cpu"))
    parallelize(network, MemoryConfig(recompute=recompute, **memory), mesh, torch.float32, False, host=host)
    return network.train()


def count_on_cpu(
    config: Any, lora: LoraExtension, geometry: Geometry, recompute: Recompute, **memory: Any
) -> tuple[int, int]:
    """FLOPs of a real forward and of a real backward pass."""
    network = on_cpu(config, lora, recompute, **memory)
    latents_BTCHW, told_B, conditions = empty_inputs(FAMILY, config, geometry)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as forward:
        loss = network(latents_BTCHW.normal_(), told_B, conditions["text_BLC"].normal_()).square().mean()
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def traced(config: Any, lora: LoraExtension, geometry: Geometry, recompute: Recompute) -> tuple[int, int]:
    """What a plan says of the same step."""
    trace = trace_step(Work(FAMILY, config, lora, geometry, recompute))
    return trace.forward_flops, trace.backward_flops


CASES = [
    (True, Recompute.none, LORA_TARGETS, GEOMETRIES[0]),
    (True, Recompute.full, LORA_TARGETS, GEOMETRIES[0]),
    (True, Recompute.full, LORA_TARGETS, GEOMETRIES[2]),
    (True, Recompute.full, NOT_NORM1, GEOMETRIES[1]),
    (True, Recompute.keep_attention, LORA_TARGETS, GEOMETRIES[1]),
    (True, Recompute.keep_attention, ["attn1.to_q", "ff.net.2"], GEOMETRIES[0]),
    (False, Recompute.none, NOT_NORM1, GEOMETRIES[1]),
    (False, Recompute.full, LORA_TARGETS, GEOMETRIES[1]),
    (False, Recompute.full, ["ff.net.2"], GEOMETRIES[0]),
    (False, Recompute.keep_attention, NOT_NORM1, GEOMETRIES[2]),
]


@pytest.mark.parametrize(("rotary", "recompute", "targets", "geometry"), CASES)
def test_flops_equal_those_counted_on_real_tensors(
    rotary: bool, recompute: Recompute, targets: list[str], geometry: Geometry
) -> None:
    config, lora = small_config(rotary), lora_of(4, targets)
    counted = count_on_cpu(config, lora, geometry, recompute)
    assert step_flops(FAMILY, config, lora, geometry, recompute) == counted
    assert traced(config, lora, geometry, recompute) == counted


@pytest.mark.parametrize("num_layers", [1, 2, 8])
def test_flops_at_any_depth(num_layers: int) -> None:
    config, lora, geometry = small_config(True, num_layers), lora_of(2), GEOMETRIES[0]
    counted = count_on_cpu(config, lora, geometry, Recompute.none)
    assert step_flops(FAMILY, config, lora, geometry) == traced(config, lora, geometry, Recompute.none) == counted


def test_policies_differ_by_what_they_recompute() -> None:
    config = small_config(rotary=True)
    (forward, none), (_, full), (_, keep) = (
        step_flops(FAMILY, config, lora_of(4), GEOMETRIES[0], policy)
        for policy in (Recompute.none, Recompute.full, Recompute.keep_attention)
    )
    attention = config.num_layers * attention_flops(config, GEOMETRIES[0])
    assert full - keep == attention
    assert attention < full - none < forward


def test_flops_at_full_size_by_three_independent_ways() -> None:
    """torch's count, a plan's trace, and the family's formula. 1.47e15 forward at 129 frames of 480x720."""
    config, geometry, lora = FAMILY.published_config("zai-org/CogVideoX-5b"), Geometry(129, 480, 720, 8), lora_of(64)
    forward, backward = step_flops(FAMILY, config, lora, geometry)
    closed = forward_flops(config, geometry) + lora_forward_flops(config, geometry, 64, LORA_TARGETS)
    assert forward == closed
    assert traced(config, lora, geometry, Recompute.none) == (forward, backward)
    full, keep = (sum(traced(config, lora, geometry, policy)) for policy in (Recompute.full, Recompute.keep_attention))
    assert full == pytest.approx(5.99e15, rel=1e-3)
    assert keep / full == pytest.approx(0.827, abs=1e-3)


@pytest.mark.parametrize(
    ("recompute", "kernel"),
    [
        (Recompute.none, TracedKernel.math),
        (Recompute.full, TracedKernel.fused),
        (Recompute.keep_attention, TracedKernel.fused),
    ],
)
def test_a_trace_of_three_blocks_tells_all_of_a_deeper_one(recompute: Recompute, kernel: TracedKernel) -> None:
    work = Work(FAMILY, small_config(True, 6), lora_of(4), GEOMETRIES[1], recompute, kernel=kernel)
    assert trace_step(work) == trace_blocks(work, 6)


def test_ranks_of_a_sequence_group_share_flops_and_memory() -> None:
    geometry = Geometry(49, 64, 64, 8)
    # Deep, as every rank has the whole batch.
    work = Work(FAMILY, small_config(True, 20), lora_of(4), geometry, Recompute.none)
    whole, half = trace_step(work), trace_step(dataclasses.replace(work, sequence_size=2))
    assert half.forward_flops / whole.forward_flops == pytest.approx(0.5, abs=0.02)
    assert half.kept_bytes / whole.kept_bytes == pytest.approx(0.5, abs=0.1)


def test_meter_of_a_step_sees_what_is_freed() -> None:
    with CostCounter() as meter:
        first = torch.ones(256, 256)
        second = first + 1
        view = second.view(-1)
        assert meter.live_bytes == 2 * 256 * 256 * 4
        del first
        assert meter.live_bytes == 256 * 256 * 4
        del second, view
        assert meter.live_bytes == 0
        assert meter.peak_bytes == 2 * 256 * 256 * 4
        product = torch.ones(8, 16) @ torch.ones(16, 4)
    assert product.shape == (8, 4)
    assert meter.flops == 2 * 8 * 16 * 4


@pytest.mark.parametrize("recompute", list(Recompute), ids=lambda policy: policy.name)
def test_flops_of_feed_forward_layers_in_pieces(recompute: Recompute) -> None:
    config, lora, memory = small_config(True), lora_of(4), {"feed_forward_chunks": 3}
    trace = trace_step(Work(FAMILY, config, lora, GEOMETRIES[0], recompute, **memory))
    counted = count_on_cpu(config, lora, GEOMETRIES[0], recompute, **memory)
    assert (trace.forward_flops, trace.backward_flops) == counted
    assert trace.backward_flops > traced(config, lora, GEOMETRIES[0], recompute)[1]


# Policies alone, and the levers of exp/129f_48g and exp/129f_24g.
LEVERS: list[tuple[Recompute, dict[str, Any]]] = [
    *((policy, {}) for policy in Recompute),
    (Recompute.full, {"offload_activations": True}),
    (Recompute.keep_attention, {"offload_activations": True}),
    (Recompute.full, {"feed_forward_chunks": 4}),
    (Recompute.none, {"feed_forward_chunks": 4}),
    (Recompute.full, {"offload_activations": True, "feed_forward_chunks": 8}),
]


@pytest.mark.parametrize(("recompute", "memory"), LEVERS)
def test_memory_of_a_trace_is_that_of_the_same_step_on_real_tensors(
    recompute: Recompute, memory: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live, peak and moved bytes of a real fp32 CPU step, to the little that CPU kernels do differently."""
    for operator in CPU_ATTENTION:
        # A product like the GPU's.
        monkeypatch.setitem(flop_registry, operator, lambda *args, **kwargs: 0)
    config, lora, geometry = small_config(True), lora_of(4), Geometry(49, 64, 64, 8)
    trace = trace_step(
        Work(
            FAMILY,
            config,
            lora,
            geometry,
            recompute,
            compute_dtype=torch.float32,
            weights_dtype=torch.float32,
            **memory,
        )
    )
    host = NoHost()
    network = on_cpu(config, lora, recompute, host, **memory)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with CostCounter() as meter:
        latents_BTCHW, told_B, conditions = empty_inputs(FAMILY, config, geometry)
        target_BTCHW = torch.randn_like(latents_BTCHW)
        prediction_BTCHW = network(latents_BTCHW.normal_(), told_B, conditions["text_BLC"].normal_())
        loss = (prediction_BTCHW.float() - target_BTCHW.float()).square().mean(dim=(2, 3, 4)).mean()
        del prediction_BTCHW
        kept_bytes = meter.live_bytes
        meter.peak_bytes = 0
        loss.backward()
    assert trace.kept_bytes == pytest.approx(kept_bytes, rel=0.02)
    assert trace.backward_peak_bytes == pytest.approx(meter.peak_bytes, rel=0.02)
    assert trace.host_bytes == host.num_bytes
    assert (host.num_bytes > 0) == ("offload_activations" in memory)
    # The real step also draws its inputs.
    assert trace.moved_bytes == pytest.approx(meter.moved_bytes, rel=0.03)
