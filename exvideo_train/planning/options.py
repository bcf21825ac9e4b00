"""Which changes would make an experiment fit, or make it faster and still fit: each one planned, not guessed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from exvideo_train.config.experiment import Recompute
from exvideo_train.config.plan import DeviceKind, Plan
from exvideo_train.errors import UserError
from exvideo_train.parallel.hardware import device_by_name
from exvideo_train.planning.forecast import Forecast, Model, forecast

# What plan suggests at most.
MAX_OPTIONS = 6
SHORTER_FRAMES = (193, 161, 129, 97, 81, 65, 49)
# Devices with more memory that are commonly rented, smaller first.
LARGER_DEVICES = (DeviceKind.a100_40gb, DeviceKind.a100_80gb, DeviceKind.h200)

Change = tuple[str, Any]


@dataclass(frozen=True)
class Option:
    """One or two options changed, and what comes of it.

    Attributes:
        same_result: whether training yields the same adapter but for rounding.
    """

    changes: tuple[Change, ...]
    same_result: bool
    forecast: Forecast

    @property
    def text(self) -> str:
        """As on a command line."""
        return " ".join(f"{name}={_shown(value)}" for name, value in self.changes)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "name", value))


def ways_to_fit(config: Plan, model: Model) -> list[Option]:
    """Changes after which the experiment fits, cheapest first.

    Those that leave the result as it is come first, in the order of GPU seconds a sample; then those that change
    what is trained or the hardware.
    """
    exact = [(change,) for change in _exact_changes(config, model)]
    found = _fitting(config, model, exact, same_result=True)
    if not found:
        pairs = [pair for pair in itertools.combinations((c for (c,) in exact), 2) if pair[0][0] != pair[1][0]]
        found = _fitting(config, model, pairs, same_result=True)
    other: list[tuple[Change, ...]] = [(change,) for change in _other_changes(config)]
    return [*found[:MAX_OPTIONS], *_fitting(config, model, other, same_result=False)[:MAX_OPTIONS]]


def ways_to_be_faster(config: Plan, model: Model, base: Forecast) -> list[Option]:
    """Recomputation policies that fit too and take fewer GPU seconds a sample, fastest first."""
    changes: list[tuple[Change, ...]] = [
        (("memory.recompute", policy),) for policy in Recompute if policy is not config.memory.recompute
    ]
    options = _fitting(config, model, changes, same_result=True)
    return [option for option in options if option.forecast.gpu_seconds_per_sample < base.gpu_seconds_per_sample]


def _fitting(config: Plan, model: Model, choices: list[tuple[Change, ...]], same_result: bool) -> list[Option]:
    options = []
    for changes in choices:
        planned = _planned(config, model, changes)
        if planned is not None and planned.fits:
            options.append(Option(changes, same_result, planned))
    return sorted(options, key=lambda option: option.forecast.gpu_seconds_per_sample)


def _planned(config: Plan, model: Model, changes: tuple[Change, ...]) -> Forecast | None:
    """The forecast after changes; None where they do not go together."""
    try:
        return forecast(changed(config, changes), model)
    except UserError:
        return None


def changed(config: Plan, changes: tuple[Change, ...]) -> Plan:
    """A copy of the options with some of them set, by dotted name."""
    result = copy.deepcopy(config)
    for name, value in changes:
        *groups, last = name.split(".")
        target: Any = result
        for group in groups:
            target = getattr(target, group)
        setattr(target, last, value)
    return result


def _exact_changes(config: Plan, model: Model) -> Iterator[Change]:
    memory = config.memory
    if memory.recompute is Recompute.none:
        yield "memory.recompute", Recompute.keep_attention
    if memory.recompute is not Recompute.full:
        yield "memory.recompute", Recompute.full
    if config.data.batch_size > 1:
        yield "data.batch_size", 1
    for stage in (2, 3):
        if stage > memory.zero_stage:
            yield "memory.zero_stage", stage
    if not memory.offload_optimizer:
        yield "memory.offload_optimizer", True
    for ranks in (2, 4, 8):
        # More ranks than a sample has work for, or across nodes, would only be slower.
        if config.parallel.sequence < ranks <= config.gpus_per_node:
            yield "parallel.sequence", ranks


def _other_changes(config: Plan) -> Iterator[Change]:
    here = device_by_name(config.device.value)
    for kind in LARGER_DEVICES:
        if device_by_name(kind.value).memory_gib > here.memory_gib:
            yield "device", kind
    for rank in (32, 16):
        if rank < config.lora.rank:
            yield "lora.rank", rank
    for frames in SHORTER_FRAMES:
        if frames < config.num_frames:
            yield "num_frames", frames
