"""What an experiment will take on given hardware: memory, time, wire, disk."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exvideo_train.config.experiment import AttentionKernel, plain_config
from exvideo_train.config.plan import Interconnect, Plan
from exvideo_train.errors import UserError
from exvideo_train.extensions.extension import Extension
from exvideo_train.geometry import Geometry
from exvideo_train.models.family import Family
from exvideo_train.models.registry import FAMILIES, backbone_config, backbone_family
from exvideo_train.models.shapes import input_shapes, stored_shapes
from exvideo_train.parallel.engine import deepspeed_config
from exvideo_train.parallel.hardware import NETWORKS, Device, device_by_name
from exvideo_train.parallel.mesh import check_mesh
from exvideo_train.parallel.parallelize import compute_dtype
from exvideo_train.planning.memory import (
    FP32_BYTES,
    Sharding,
    StepMemory,
    optimizer_memory,
    step_memory,
)
from exvideo_train.planning.step_time import Links, StepTime, step_time
from exvideo_train.planning.trace import StepTrace, TracedKernel, Work, trace_step
from exvideo_train.training.order import samples_within_budget

GIB = 2**30
PCIE_BYTES_PER_SECOND = 32e9
# Latents and text embeddings are kept as the bf16 encoders give them.
STORED_BYTES = 2
HOURS_PER_DAY = 24
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Model:
    """The network that a plan is about, without its weights."""

    family: Family[Any]
    config: Any

    def num_tokens(self, geometry: Geometry) -> int:
        """Length of the sequence that one sample becomes."""
        return self.family.grid.num_tokens(geometry) + (self.family.text_length(self.config) or 0)


@dataclass(frozen=True)
class Sizes:
    """Parameters of the network before anything is trained, those that stay frozen and those that are trained, and the
    attention's heads: none without attention."""

    whole: int
    frozen: int
    trained: int
    num_heads: int
    head_dim: int


@functools.lru_cache(maxsize=8)
def sizes(model: Model, extension: Extension) -> Sizes:
    """Counted on the meta device.

    Raises:
        UserError: what is to be trained does not fit the network.
    """
    with torch.device("meta"):
        network = model.family.build(model.config)
        whole = sum(parameter.numel() for parameter in network.parameters())
        extension.attach(network, seed=0)
    trained = sum(parameter.numel() for parameter in extension.trained(network).values())
    # What is trained may be added to the network, or chosen from it.
    frozen = sum(parameter.numel() for parameter in network.parameters()) - trained
    attention: Any = next((module for module in network.modules() if hasattr(module, "attend")), None)
    heads = (attention.num_heads, attention.head_dim) if attention is not None else (0, 0)
    return Sizes(whole, frozen, trained, *heads)


@dataclass(frozen=True)
class Forecast:
    """What one experiment takes on one kind of device.

    Attributes:
        geometry: the costliest of the experiment's.
        batch_size: samples of it in a micro-step of one data-parallel rank.
        trained: parameters that are trained.
        trace: of one micro-step on one rank.
        samples_per_step: over all ranks and micro-steps.
    """

    device: Device
    world_size: int
    sequence_size: int
    geometry: Geometry
    batch_size: int
    num_tokens: int
    trained: int
    trace: StepTrace
    memory: StepMemory
    time: StepTime
    samples_per_step: int
    max_steps: int

    @property
    def spare_bytes(self) -> int:
        """Device memory left over; negative when it does not fit."""
        return int(self.device.memory_gib * GIB) - self.memory.total

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def flops_per_step(self) -> float:
        """Of one rank in one optimizer step."""
        micro_steps = self.samples_per_step * self.sequence_size / (self.batch_size * self.world_size)
        return micro_steps * (self.trace.forward_flops + self.trace.backward_flops)

    @property
    def share_of_peak(self) -> float:
        """Of the device's FLOP/s, in the estimated time; recomputation counts as work."""
        return self.flops_per_step / self.time.total / self.device.peak_flops

    @property
    def gpu_seconds_per_sample(self) -> float:
        return self.time.total * self.world_size / self.samples_per_step

    @property
    def run_hours(self) -> float:
        return self.max_steps * self.time.total / SECONDS_PER_HOUR

    @property
    def gpu_hours(self) -> float:
        return self.run_hours * self.world_size


def find_model(config: Plan) -> Model:
    """The backbone's shape: from a local folder, else what is known of a published hub id; nothing is downloaded.

    Raises:
        UserError: neither a model folder nor a known hub id.
    """
    path = Path(config.model.path).expanduser()
    for family in FAMILIES:
        found = family.published_config(config.model.path)
        if path.exists():
            family, found = backbone_family(path), backbone_config(path)
        if found is not None:
            for geometry in config.trained_geometries:
                family.grid.check(geometry)
            return Model(family, found)
    raise UserError(
        f"model.path={config.model.path}: no such folder, and its shape is not known without a download; "
        "download the model and give its folder"
    )


def extension_of(config: Plan, model: Model) -> Extension:
    """What is trained; without dropout, which draws numbers that a plan does not count."""
    options = plain_config(config)
    options["lora"]["dropout"] = 0.0
    extension: Extension = model.family.extension().from_options(options)
    return extension


def forecast(config: Plan, model: Model, device_name: str | None = None) -> Forecast:
    """Plan an experiment on its device, or on another one.

    Raises:
        UserError: the options do not fit one another or the model.
    """
    check_mesh(config.gpus, config.parallel.sequence, sizes(model, extension_of(config, model)).num_heads)
    device = device_by_name(device_name or config.device.value)
    works = [_work(config, model, geometry) for geometry in config.trained_geometries]
    work = max(works, key=lambda work: trace_step(work).forward_flops) if len(works) > 1 else works[0]
    trace, size = trace_step(work), sizes(model, extension_of(config, model))
    trained, frozen_bytes = size.trained, size.frozen * work.weights_dtype.itemsize
    sharding = Sharding(
        trained=trained,
        frozen_bytes=frozen_bytes,
        world_size=config.gpus,
        stage=config.memory.zero_stage,
        offload=config.memory.offload_optimizer,
        keep_ema=config.optim.ema_decay > 0,
        accumulation_steps=config.optim.accumulation_steps,
        reduce_bucket=reduce_bucket(config),
    )
    fp32 = work.compute_dtype == torch.float32
    return Forecast(
        device=device,
        world_size=config.gpus,
        sequence_size=config.parallel.sequence,
        geometry=work.geometry,
        batch_size=work.batch_size,
        num_tokens=model.num_tokens(work.geometry),
        trained=trained,
        trace=trace,
        memory=memory_of(model, work, size, sharding),
        time=step_time(trace, sharding, device, _links(config, device), config.parallel.sequence, fp32),
        samples_per_step=work.batch_size * config.optim.accumulation_steps * config.gpus // config.parallel.sequence,
        max_steps=config.max_steps,
    )


def reduce_bucket(config: Plan) -> int:
    """Elements of DeepSpeed's gradient bucket, as the engine will ask for it."""
    return int(deepspeed_config(config)["zero_optimization"]["reduce_bucket_size"])


def _work(config: Plan, model: Model, geometry: Geometry) -> Work:
    budget, num_tokens = config.data.token_budget, model.family.grid.num_tokens(geometry)
    dtype = compute_dtype(config.model.dtype)
    return Work(
        family=model.family,
        config=model.config,
        extension=extension_of(config, model),
        geometry=geometry,
        recompute=config.memory.recompute,
        batch_size=samples_within_budget(num_tokens, budget) if budget else config.data.batch_size,
        compute_dtype=dtype,
        weights_dtype=dtype,
        kernel=TracedKernel.math if config.memory.attention is AttentionKernel.math else TracedKernel.fused,
        sequence_size=config.parallel.sequence,
        offload_activations=config.memory.offload_activations,
        feed_forward_chunks=config.memory.feed_forward_chunks,
    )


def memory_of(model: Model, work: Work, size: Sizes, sharding: Sharding) -> StepMemory:
    """A rank's memory in a step: the trace's activations, and what the optimizer holds."""
    trace = trace_step(work)
    return step_memory(
        optimizer_memory(sharding),
        forward_peak=trace.forward_peak_bytes,
        kept=trace.kept_bytes,
        backward_peak=trace.backward_peak_bytes,
        workspace=_attention_workspace(model, work, size),
        batch=_batch_bytes(work),
        host=trace.host_bytes,
    )


def _attention_workspace(model: Model, work: Work, size: Sizes) -> int:
    """What a fused attention's backward pass takes for itself: the queries' gradient and a sum a row, in fp32.

    FlashAttention-2 adds the gradient up in fp32 over blocks of keys (``dq_accum`` in csrc/flash_attn/flash_api.cpp).
    """
    if work.kernel is TracedKernel.math:
        return 0
    tokens = work.batch_size * model.num_tokens(work.geometry)
    return int(FP32_BYTES * tokens * (size.num_heads // work.sequence_size) * (size.head_dim + 1))


def _batch_bytes(work: Work) -> int:
    """Noisy latents, target and conditions of a micro-step."""
    shapes = input_shapes(work.family, work.config, work.geometry, work.batch_size)
    latents = math.prod(shapes.latents)
    return FP32_BYTES * (2 * latents + sum(math.prod(shape) for shape in shapes.conditions.values()))


def _links(config: Plan, device: Device) -> Links:
    inside = device.link_bytes_per_second
    if config.interconnect is Interconnect.pcie:
        inside = min(inside, PCIE_BYTES_PER_SECOND)
    return Links(inside, NETWORKS[config.network.value], config.gpus_per_node)


@dataclass(frozen=True)
class Disk:
    """Bytes that a run needs on disk, without videos and model."""

    latents: int
    checkpoint: int
    checkpoints: int
    adapter: int


def disk(config: Plan, model: Model, trained: int) -> Disk:
    """Of the latent store with this many clips, and of a run folder."""
    clip_bytes = 0
    for geometry in config.trained_geometries:
        shapes = stored_shapes(model.family, model.config, geometry)
        clip_bytes += STORED_BYTES * sum(math.prod(shape) for shape in shapes.values())
    copies = 3 + (config.optim.ema_decay > 0)
    checkpoint = FP32_BYTES * trained * copies
    # While one is written the older ones are still there.
    kept = config.checkpoint.keep_last + 1
    if config.checkpoint.keep_every:
        kept += config.max_steps // config.checkpoint.keep_every
    adapters = 1 + (config.optim.ema_decay > 0)
    return Disk(clip_bytes * config.clips, checkpoint, checkpoint * kept, FP32_BYTES * trained * adapters)
