"""What an experiment will take on given hardware: memory, time, wire, disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exvideo_train.config.experiment import AttentionKernel, Dtype
from exvideo_train.config.plan import Interconnect, Plan
from exvideo_train.errors import UserError
from exvideo_train.extensions.lora import LoraExtension
from exvideo_train.geometry import Geometry
from exvideo_train.models.family import BackboneFamily
from exvideo_train.models.registry import FAMILIES, backbone_config, backbone_family
from exvideo_train.parallel.engine import deepspeed_config
from exvideo_train.parallel.hardware import NETWORKS, Device, device_by_name
from exvideo_train.parallel.mesh import check_mesh
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
    """The backbone that a plan is about, without its weights."""

    family: BackboneFamily[Any]
    config: Any


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
    if path.exists():
        return Model(backbone_family(path), backbone_config(path))
    for family in FAMILIES:
        published = family.published_config(config.model.path)
        if published is not None:
            return Model(family, published)
    raise UserError(
        f"model.path={config.model.path}: no such folder, and its shape is not known without a download; "
        "download the model and give its folder"
    )


def check_plan(config: Plan, model: Model) -> None:
    """Raises UserError for hardware that cannot be and for options that do not fit it."""
    for name in ("gpus", "gpus_per_node", "clips", "max_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)}: must be at least 1")
    if config.memory.zero_stage not in (1, 2, 3):
        raise UserError(f"memory.zero_stage={config.memory.zero_stage}: must be 1, 2 or 3; 2 is the default")
    if config.price is not None and config.price < 0:
        raise UserError(f"price={config.price}: must not be negative; leave it out to plan without a price")
    for name, value in (
        ("data.batch_size", config.data.batch_size),
        ("optim.accumulation_steps", config.optim.accumulation_steps),
    ):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    check_mesh(config.gpus, config.parallel.sequence, model.config.num_attention_heads)


def forecast(config: Plan, model: Model, device_name: str | None = None) -> Forecast:
    """Plan an experiment on its device, or on another one.

    Raises:
        UserError: the options do not fit one another or the model.
    """
    check_plan(config, model)
    device = device_by_name(device_name or config.device.value)
    lora = lora_without_dropout(config)
    work = max((_work(config, model, lora, geometry) for geometry in _geometries(config)), key=_size)
    trace = trace_step(work)
    frozen_bytes, trained = parameter_bytes(model, lora, work.weights_dtype)
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
    memory = step_memory(
        optimizer_memory(sharding),
        forward_peak=trace.forward_peak_bytes,
        kept=trace.kept_bytes,
        backward_peak=trace.backward_peak_bytes,
        workspace=attention_workspace(model, work),
        batch=batch_bytes(model, work),
    )
    fp32 = work.compute_dtype == torch.float32
    return Forecast(
        device=device,
        world_size=config.gpus,
        sequence_size=config.parallel.sequence,
        geometry=work.geometry,
        batch_size=work.batch_size,
        num_tokens=model.family.num_tokens(model.config, work.geometry),
        trained=trained,
        trace=trace,
        memory=memory,
        time=step_time(trace, sharding, device, _links(config, device), config.parallel.sequence, fp32),
        samples_per_step=work.batch_size * config.optim.accumulation_steps * config.gpus // config.parallel.sequence,
        max_steps=config.max_steps,
    )


def lora_without_dropout(config: Plan) -> LoraExtension:
    """What is trained; dropout draws numbers, which a plan does not count."""
    return replace(LoraExtension.from_config(config.lora), dropout=0.0)


def reduce_bucket(config: Plan) -> int:
    """Elements of DeepSpeed's gradient bucket, as the engine will ask for it."""
    return int(deepspeed_config(config)["zero_optimization"]["reduce_bucket_size"])


def _geometries(config: Plan) -> list[Geometry]:
    return [Geometry.from_name(name) for name in config.data.geometries] or [config.geometry]


def _work(config: Plan, model: Model, lora: LoraExtension, geometry: Geometry) -> Work:
    budget = config.data.token_budget
    # A model in fp16 trains in bf16 too: see training_dtypes in exvideo_train.training.job.
    dtype = torch.float32 if config.model.dtype is Dtype.fp32 else torch.bfloat16
    return Work(
        family=model.family,
        config=model.config,
        lora=lora,
        geometry=geometry,
        recompute=config.memory.recompute,
        batch_size=samples_within_budget(geometry, budget) if budget else config.data.batch_size,
        compute_dtype=dtype,
        weights_dtype=dtype,
        kernel=TracedKernel.math if config.memory.attention is AttentionKernel.math else TracedKernel.fused,
        sequence_size=config.parallel.sequence,
    )


def _size(work: Work) -> int:
    return int(work.batch_size * work.family.forward_flops(work.config, work.geometry))


def parameter_bytes(model: Model, lora: LoraExtension, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of the frozen weights, number of trained parameters).

    Raises:
        UserError: a target that no Linear of a block has.
    """
    family, config = model.family, model.config
    unknown = [name for name in lora.target_modules if name not in family.default_lora_targets]
    if unknown:
        raise UserError(
            f"lora.targets: {unknown[0]!r} cannot be planned; known are {', '.join(family.default_lora_targets)}"
        )
    trained = family.num_lora_parameters(config, lora.rank, lora.target_modules)
    return family.num_parameters(config) * dtype.itemsize, trained


def attention_workspace(model: Model, work: Work) -> int:
    """What a fused attention's backward pass takes for itself: the queries' gradient and a sum a row, in fp32.

    FlashAttention-2 adds the gradient up in fp32 over blocks of keys (``dq_accum`` in csrc/flash_attn/flash_api.cpp).
    """
    if work.kernel is TracedKernel.math:
        return 0
    tokens = work.batch_size * model.family.num_tokens(model.config, work.geometry)
    heads = model.config.num_attention_heads // work.sequence_size
    return int(FP32_BYTES * tokens * heads * (model.config.attention_head_dim + 1))


def batch_bytes(model: Model, work: Work) -> int:
    """Noisy latents, target and text of a micro-step."""
    geometry, config = work.geometry, model.config
    latents = config.in_channels * geometry.num_latent_frames * geometry.latent_height * geometry.latent_width
    text = model.family.text_length(config) * config.text_embed_dim
    return int(FP32_BYTES * work.batch_size * (2 * latents + text))


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
    for geometry in _geometries(config):
        latents = geometry.num_latent_frames * geometry.latent_height * geometry.latent_width
        # Mean and log-variance of every channel.
        clip_bytes += STORED_BYTES * (
            2 * model.config.in_channels * latents
            + model.family.text_length(model.config) * model.config.text_embed_dim
        )
    copies = 3 + (config.optim.ema_decay > 0)
    checkpoint = FP32_BYTES * trained * copies
    # While one is written the older ones are still there.
    kept = config.checkpoint.keep_last + 1
    if config.checkpoint.keep_every:
        kept += config.max_steps // config.checkpoint.keep_every
    adapters = 1 + (config.optim.ema_decay > 0)
    return Disk(clip_bytes * config.clips, checkpoint, checkpoint * kept, FP32_BYTES * trained * adapters)
