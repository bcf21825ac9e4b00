"""Exact FLOPs of a training step, for meters and plans.

Counted by running the real network, adapter and recomputation policy on tensors without content: see
:mod:`exvideo_train.planning.trace`. Products, convolutions and attention count, two FLOPs for each multiply-add, as
torch's FlopCounterMode counts them; a fused attention's backward pass counts 2.5 times its forward pass, because the
kernel recomputes the map. Element-wise work does not count.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from exvideo_train.config.experiment import LoraConfig, Recompute
from exvideo_train.extensions.lora import LoraSettings
from exvideo_train.geometry import Geometry
from exvideo_train.models.family import BackboneFamily
from exvideo_train.models.registry import FAMILIES
from exvideo_train.planning.trace import Work, trace_step


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training sample, over all ranks that share it.

    Attributes:
        forward: of the forward pass.
        recomputed: of what the backward pass runs again under activation checkpointing.
        backward: of the backward pass proper: gradients of activations and of the adapter, none of frozen weights.
    """

    forward: int
    recomputed: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.recomputed + self.backward


def training_flops_per_sample(config: Any, lora: LoraConfig, geometry: Geometry, recompute: Recompute) -> StepFlops:
    """FLOPs of one training sample.

    Args:
        config: the backbone's own config, like ``CogVideoXConfig``.
        lora: what is trained.
        recompute: the policy; without one nothing is recomputed.

    Raises:
        UserError: the adapter does not fit the backbone.
    """
    family, settings = family_of(config), lora_settings(lora)
    plain = trace_step(Work(family, config, settings, geometry, Recompute.none))
    chosen = trace_step(Work(family, config, settings, geometry, recompute))
    return StepFlops(plain.forward_flops, chosen.backward_flops - plain.backward_flops, plain.backward_flops)


def lora_settings(lora: LoraConfig) -> LoraSettings:
    """The hashable form of the option group; without dropout, which draws numbers but costs no products."""
    return LoraSettings(lora.rank, lora.alpha, tuple(lora.targets))


def family_of(config: Any) -> BackboneFamily[Any]:
    """The family whose networks are built from this class of config."""
    for family in FAMILIES:
        if isinstance(config, typing.get_type_hints(family.model_class.__init__)["config"]):
            return family
    raise AssertionError(f"no backbone family is built from {type(config).__name__}")
