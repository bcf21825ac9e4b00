"""How each of the six measures brings long video from impossible to fitting: computed, one measure at a time.

The measures are those with which ExVideo trained CogVideoX at 129 frames: freeze the base model, bf16 for all that is
not trained, gradient checkpointing, flash attention, optimizer and gradients sharded (ZeRO-2), and text encoder and VAE
run beforehand so that training loads only the DiT.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from exvideo_train.config.experiment import Recompute
from exvideo_train.config.plan import Plan
from exvideo_train.planning.forecast import Model, extension_of, memory_of, reduce_bucket, sizes
from exvideo_train.planning.memory import FP32_BYTES, Sharding, StepMemory
from exvideo_train.planning.trace import TracedKernel, Work

# T5-v1.1-XXL's encoder and CogVideoX's VAE, in parameters; tests count them on the meta device.
TEXT_ENCODER_PARAMETERS = 4_762_310_656
VAE_PARAMETERS = 215_583_907


@dataclass(frozen=True)
class Measures:
    """Which of the six are taken; in the order of the table."""

    freezing: bool = False
    mixed_precision: bool = False
    checkpointing: bool = False
    flash_attention: bool = False
    zero2: bool = False
    encoders_offline: bool = False


TITLES = {
    "freezing": "freeze all but the extension",
    "mixed_precision": "bf16 for what is frozen and for products",
    "checkpointing": "gradient checkpointing of every block",
    "flash_attention": "flash attention",
    "zero2": "ZeRO-2 over the GPUs",
    "encoders_offline": "text encoder and VAE run beforehand",
}
ALL = Measures(*[True] * len(TITLES))


@dataclass(frozen=True)
class MeasuresRow:
    """One line of the table: memory of a GPU, the parts of it, and the encoders' weights within ``total``."""

    title: str
    memory: StepMemory
    encoders: int

    @property
    def total(self) -> int:
        return self.memory.total + self.encoders


def measures_table(config: Plan, model: Model) -> tuple[list[MeasuresRow], list[MeasuresRow]]:
    """(nothing, then each measure added to those before it; each measure alone taken away from all six)."""
    taken = Measures()
    added = [_row(config, model, taken, "none: full fine-tuning in fp32")]
    for field in fields(Measures):
        taken = replace(taken, **{field.name: True})
        added.append(_row(config, model, taken, f"+ {TITLES[field.name]}"))
    without = [
        _row(config, model, replace(ALL, **{field.name: False}), f"all but: {TITLES[field.name]}")
        for field in fields(Measures)
    ]
    return added, without


def _row(config: Plan, model: Model, taken: Measures, title: str) -> MeasuresRow:
    extension = extension_of(config, model)
    half = torch.bfloat16 if taken.mixed_precision else torch.float32
    # What is trained stays in fp32, so that without freezing every weight does.
    weights_dtype = half if taken.freezing else torch.float32
    work = Work(
        family=model.family,
        config=model.config,
        extension=extension if taken.freezing else None,
        geometry=config.geometry,
        recompute=Recompute.full if taken.checkpointing else Recompute.none,
        batch_size=config.data.batch_size,
        compute_dtype=half,
        weights_dtype=weights_dtype,
        kernel=TracedKernel.fused if taken.flash_attention else TracedKernel.math,
    )
    size = sizes(model, extension)
    frozen_bytes, trained = size.frozen * weights_dtype.itemsize, size.trained
    if not taken.freezing:
        frozen_bytes, trained = 0, size.whole
    sharding = Sharding(
        trained, frozen_bytes, config.gpus, stage=2 if taken.zero2 else 0, reduce_bucket=reduce_bucket(config)
    )
    encoders = 0
    if not taken.encoders_offline:
        number_bytes = half.itemsize if taken.mixed_precision else FP32_BYTES
        encoders = number_bytes * (TEXT_ENCODER_PARAMETERS + VAE_PARAMETERS)
    return MeasuresRow(title, memory_of(model, work, size, sharding), encoders)
