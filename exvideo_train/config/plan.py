"""The options of ``python -m exvideo_train.plan``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from exvideo_train.config.experiment import Experiment
from exvideo_train.config.options import Range


class DeviceKind(Enum):
    """The devices of :data:`exvideo_train.parallel.hardware.DEVICES`, by name."""

    a100_80gb = "a100_80gb"
    a100_40gb = "a100_40gb"
    h100 = "h100"
    h100_pcie = "h100_pcie"
    h100_nvl = "h100_nvl"
    h200 = "h200"
    b200 = "b200"
    h20 = "h20"
    l40s = "l40s"
    a6000_ada = "a6000_ada"
    a6000 = "a6000"
    rtx5090 = "rtx5090"
    rtx4090 = "rtx4090"
    rtx3090 = "rtx3090"
    a10 = "a10"
    l4 = "l4"


class Network(Enum):
    """Links between nodes, as in :data:`exvideo_train.parallel.hardware.NETWORKS`."""

    ethernet_10g = "ethernet_10g"
    ethernet_25g = "ethernet_25g"
    ethernet_100g = "ethernet_100g"
    infiniband_200g = "infiniband_200g"
    infiniband_400g = "infiniband_400g"
    infiniband_8x400g = "infiniband_8x400g"


class Interconnect(Enum):
    """Links inside a node."""

    auto = "auto"
    nvlink = "nvlink"
    pcie = "pcie"


@dataclass
class Plan(Experiment):
    gpus: Annotated[int, Range(1)] = 8
    """GPUs of the whole job: one rank each."""
    gpus_per_node: Annotated[int, Range(1)] = 8
    """GPUs of one machine."""
    device: DeviceKind = DeviceKind.a100_80gb
    """Which GPU the plan is for; step times of a100_80gb, h100 and h200 are printed in any case."""
    interconnect: Interconnect = Interconnect.auto
    """Links inside a node: auto takes the device's own (NVLink where it has it), pcie 32 GB/s a direction."""
    network: Network = Network.infiniband_400g
    """Link of each node to the others, when gpus is more than gpus_per_node."""
    clips: Annotated[int, Range(1)] = 10000
    """Clips of the latent store, for epochs and disk."""
    price: Annotated[float | None, Range(0, advice="leave it out to plan without a price")] = None
    """Price of a GPU for an hour, in any currency: adds the price of the run."""
    measures: bool = False
    """Print instead how each of the six measures brings this experiment from impossible to fitting."""
    json: str | None = None
    """File to write the plan to as JSON too."""
