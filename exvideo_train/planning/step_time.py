"""How long a step should take: work from a trace, over what a device reaches of its vendor's figures.

An estimate and called one wherever it is printed: products, attention and element-wise work follow one another, links
are not overlapped, and every share is a named constant with its source in :mod:`exvideo_train.parallel.hardware`.
"""

from __future__ import annotations

from dataclasses import dataclass

from exvideo_train.parallel.hardware import LINK_SHARE, MATMUL_SHARE, MEMORY_BANDWIDTH_SHARE, Device
from exvideo_train.planning.memory import FP32_BYTES, Sharding
from exvideo_train.planning.trace import StepTrace

# fp32 products without TF32 against bf16 ones: 19.5 of 312 TFLOP/s on A100, 67 of 989 on H100.
FP32_SHARE_OF_PEAK = 1 / 16
# Parameters a second that AdamW updates on the host, a rank: assumed, memory-bound at 20 GB/s and 28 bytes a parameter.
HOST_UPDATES_PER_SECOND = 0.7e9
# One direction of PCIe 4.0 x16, which offloaded activations, gradients and parameters cross.
HOST_LINK_BYTES_PER_SECOND = 32e9


@dataclass(frozen=True)
class Links:
    """Bytes a second and direction between devices of a node and of different nodes."""

    inside_node: float
    between_nodes: float
    gpus_per_node: int

    def rate(self, num_ranks: int) -> float:
        """Of the slowest link that this many neighbouring ranks span, as far as it is reached."""
        slowest = self.inside_node
        if num_ranks > self.gpus_per_node:
            slowest = min(slowest, self.between_nodes)
        return LINK_SHARE * slowest


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what they are spent on.

    Attributes:
        wire_bytes: sent by one rank in a step.
    """

    products: float
    attention: float
    elementwise: float
    communication: float
    offload: float
    wire_bytes: int

    @property
    def total(self) -> float:
        return self.products + self.attention + self.elementwise + self.communication + self.offload


def step_time(
    trace: StepTrace, sharding: Sharding, device: Device, links: Links, sequence_size: int, fp32: bool
) -> StepTime:
    """Of an optimizer step of ``sharding.accumulation_steps`` micro-steps with this trace.

    Args:
        fp32: products are computed in fp32 instead of bf16.
    """
    micro_steps = sharding.accumulation_steps
    share = FP32_SHARE_OF_PEAK if fp32 else 1.0
    attention_flops = trace.attention_forward_flops + trace.attention_backward_flops
    product_flops = trace.forward_flops + trace.backward_flops - attention_flops
    attention = (
        trace.attention_forward_flops / device.attention_forward_flops
        + trace.attention_backward_flops / device.attention_backward_flops
    )
    sequence_bytes = micro_steps * trace.sequence_wire_bytes
    data_bytes = zero_wire_bytes(sharding)
    offload = micro_steps * 2 * trace.host_bytes / HOST_LINK_BYTES_PER_SECOND
    if sharding.offload:
        part = sharding.trained / sharding.world_size
        offload += 2 * FP32_BYTES * part / HOST_LINK_BYTES_PER_SECOND + part / HOST_UPDATES_PER_SECOND
    return StepTime(
        products=micro_steps * product_flops / (share * MATMUL_SHARE * device.peak_flops),
        attention=micro_steps * attention / share,
        elementwise=micro_steps * trace.moved_bytes / (MEMORY_BANDWIDTH_SHARE * device.memory_bytes_per_second),
        communication=sequence_bytes / links.rate(sequence_size) + data_bytes / links.rate(sharding.world_size),
        offload=offload,
        wire_bytes=sequence_bytes + data_bytes,
    )


def zero_wire_bytes(sharding: Sharding) -> int:
    """Sent by one rank in an optimizer step for gradients and weights, with collectives in rings.

    Gradients are all-reduced (DeepSpeed's bucketed reduce-scatter runs as an all-reduce): under ZeRO-2 and 3 after
    every micro-step. Updated weights are gathered once. ZeRO-3 gathers weights of every kind for forward and for
    backward instead.
    """
    whole, others = FP32_BYTES * sharding.trained, sharding.world_size - 1
    micro_steps = sharding.accumulation_steps
    reductions = micro_steps if sharding.stage >= 2 else 1
    total = 2 * whole * reductions
    if sharding.stage == 3:
        total = whole * micro_steps + 2 * (whole + sharding.frozen_bytes) * micro_steps
    elif sharding.stage:
        total += whole
    return total * others // sharding.world_size
