"""What devices and links can do: the vendors' figures, and the shares of them that are reached.

Peaks are dense bf16 with fp32 accumulation from NVIDIA's and AMD's data sheets (never the doubled "sparse" figures);
memory is what ``torch.cuda.get_device_properties`` reports, a little under the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

GIGA = 1e9


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Attributes:
        name: as the plan's option names it.
        pattern: regular expression searched for in the driver's name, first match in the table wins.
        memory_gib: usable memory.
        peak_flops: bf16 products a second, dense, fp32 accumulation.
        memory_bytes_per_second: of device memory.
        link_bytes_per_second: each direction of its fastest link to the next device of a node.
        attention_forward_flops, attention_backward_flops: what fused attention with head dim 64 reaches.
        attention_source: where the last two come from.
    """

    name: str
    pattern: str
    memory_gib: float
    peak_flops: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    attention_forward_flops: float
    attention_backward_flops: float
    attention_source: str


MEASURED_H100 = "cuDNN, head dim 64, 16k tokens, measured on H100 by the FlashAttention-3 authors (arXiv 2407.08608)"
MEASURED_A100 = "FlashAttention-2, mixed shapes, forward; backward assumed equal"
SCALED = "assumed: the A100's share of peak (0.44)"
SCALED_HOPPER = "assumed: the H100's share of peak (0.42 forward, 0.44 backward)"


def _scaled(name: str, pattern: str, memory_gib: float, peak: float, memory_bandwidth: float, link: float) -> Device:
    """A device without a published attention figure: the share of peak that the A100 reaches."""
    share = 136 / 312
    return Device(
        name, pattern, memory_gib, peak, memory_bandwidth, link, share * peak, share * peak, attention_source=SCALED
    )


# More special patterns stand before the more general ones that would match them too.
DEVICES: tuple[Device, ...] = (
    Device("a100_80gb", r"A[18]00.*80G", 79.2, 312e12, 2.04e12, 300e9, 136e12, 136e12, MEASURED_A100),
    Device("a100_40gb", r"A100", 39.4, 312e12, 1.56e12, 300e9, 136e12, 136e12, MEASURED_A100),
    Device("h200", r"H200", 139.8, 989e12, 4.8e12, 450e9, 413e12, 433e12, MEASURED_H100),
    Device("h100_nvl", r"H100 NVL", 93.1, 835e12, 3.9e12, 300e9, 349e12, 366e12, SCALED_HOPPER),
    Device("h100_pcie", r"H100 PCIe", 79.1, 756e12, 2.0e12, 32e9, 316e12, 331e12, SCALED_HOPPER),
    Device("h100", r"H[18]00", 79.2, 989e12, 3.35e12, 450e9, 413e12, 433e12, MEASURED_H100),
    Device("b200", r"B200", 178.4, 2250e12, 8.0e12, 900e9, 940e12, 985e12, SCALED_HOPPER),
    _scaled("h20", r"H20\b", 95.1, 148e12, 4.0e12, 450e9),
    _scaled("l40s", r"L40S", 44.4, 362e12, 0.864e12, 32e9),
    _scaled("a6000_ada", r"RTX 6000 Ada", 47.4, 364e12, 0.96e12, 32e9),
    _scaled("a6000", r"RTX A6000", 47.5, 155e12, 0.768e12, 32e9),
    _scaled("rtx5090", r"RTX 5090", 31.4, 209.5e12, 1.79e12, 64e9),
    _scaled("rtx4090", r"RTX 4090", 23.6, 165.2e12, 1.008e12, 32e9),
    _scaled("rtx3090", r"RTX 3090", 23.6, 71e12, 0.936e12, 32e9),
    _scaled("a10", r"A10G?\b", 22.0, 125e12, 0.6e12, 32e9),
    _scaled("l4", r"\bL4\b", 22.0, 121e12, 0.3e12, 32e9),
)

# Shares of a device's peak that are reached elsewhere. Assumed until benchmarks/step.py has run on a GPU: large bf16
# products commonly reach 0.7-0.8 of the peak on A100 and 0.6-0.7 on Hopper; element-wise kernels 0.8 of the bandwidth.
MATMUL_SHARE = 0.65
MEMORY_BANDWIDTH_SHARE = 0.8
LINK_SHARE = 0.7

# Links between nodes, bytes a second of each node and direction.
NETWORKS: dict[str, float] = {
    "ethernet_10g": 1.25 * GIGA,
    "ethernet_25g": 3.125 * GIGA,
    "ethernet_100g": 12.5 * GIGA,
    "infiniband_200g": 25 * GIGA,
    "infiniband_400g": 50 * GIGA,
    "infiniband_8x400g": 400 * GIGA,
}


def device_by_name(name: str) -> Device:
    """The table's entry of that name."""
    return next(device for device in DEVICES if device.name == name)


def identify_device(driver_name: str) -> Device | None:
    """The table's entry for a name that the driver gives, or None."""
    return next((device for device in DEVICES if re.search(device.pattern, driver_name)), None)


def device_peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s that a device can reach; None for a CPU and for GPUs that the table does not know."""
    if device.type != "cuda":
        return None
    known = identify_device(torch.cuda.get_device_name(device))
    return known.peak_flops if known else None
