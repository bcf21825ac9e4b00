"""Which changes would make an experiment fit, or make it faster and still fit: each one planned, not guessed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from exvideo_train.config.experiment import Recompute
from exvideo_train.config.plan import DeviceKind, Plan
from exvideo_train.errors import UserError
from exvideo_train.parallel.hardware import device_by_name
from exvideo_train.planning.forecast import Forecast, Model, forecast

# What plan suggests at most.
MAX_SUGGESTIONS = 6
# Changes that are tried together, when fewer do not help.
MOST_CHANGES = 3
# Pieces that feed-forward layers are cut into; more save little more.
FEED_FORWARD_CHUNKS = 8
SHORTER_FRAMES = (193, 161, 129, 97, 81, 65, 49)
# Devices with more memory that are commonly rented, smaller first.
LARGER_DEVICES = (DeviceKind.a100_40gb, DeviceKind.a100_80gb, DeviceKind.h200)

Change = tuple[str, Any]
Changes = tuple[Change, ...]


@dataclass(frozen=True)
class Suggestion:
    """One or more options changed, and what comes of it.

    Attributes:
        same_adapter: whether training yields the same adapter but for rounding.
    """

    changes: Changes
    same_adapter: bool
    forecast: Forecast

    @property
    def text(self) -> str:
        """As on a command line."""
        return " ".join(f"{name}={_shown(value)}" for name, value in self.changes)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "name", value))


def ways_to_fit(config: Plan, model: Model) -> list[Suggestion]:
    """Changes after which the experiment fits, cheapest first.

    First those that yield the same adapter on the same GPUs, in the order of GPU seconds a sample; then larger GPUs,
    the smallest first; then those that change what is trained, the least first.
    """
    exact = list(_exact_changes(config))
    found = _fitting(config, model, exact, same_adapter=True)
    for number in range(2, MOST_CHANGES + 1):
        if found:
            break
        groups = itertools.combinations(exact, number)
        together = [sum(group, ()) for group in groups if len({change[0][0] for change in group}) == number]
        found = _fitting(config, model, together, same_adapter=True)
    found = sorted(found, key=_cost)[:MAX_SUGGESTIONS]
    found += _fitting(config, model, _larger_devices(config), same_adapter=True)
    return found + _fitting(config, model, _changes_of_result(config), same_adapter=False)


def ways_to_be_faster(config: Plan, model: Model, base: Forecast) -> list[Suggestion]:
    """Recomputation policies that fit too and take fewer GPU seconds a sample, fastest first."""
    changes: list[Changes] = [
        (("memory.recompute", policy),) for policy in Recompute if policy is not config.memory.recompute
    ]
    suggestions = _fitting(config, model, changes, same_adapter=True)
    return sorted(
        (suggestion for suggestion in suggestions if _cost(suggestion) < base.gpu_seconds_per_sample), key=_cost
    )


def _cost(suggestion: Suggestion) -> float:
    return suggestion.forecast.gpu_seconds_per_sample


def _fitting(config: Plan, model: Model, choices: Iterable[Changes], same_adapter: bool) -> list[Suggestion]:
    suggestions = []
    for changes in choices:
        try:
            planned = forecast(changed(config, changes), model)
        except UserError:
            # These changes do not go together.
            continue
        if planned.fits:
            suggestions.append(Suggestion(changes, same_adapter, planned))
    return suggestions


def changed(config: Plan, changes: Changes) -> Plan:
    """A copy of the options with some of them set, by dotted name."""
    result = copy.deepcopy(config)
    for name, value in changes:
        *groups, last = name.split(".")
        target: Any = result
        for group in groups:
            target = getattr(target, group)
        setattr(target, last, value)
    return result


def _exact_changes(config: Plan) -> Iterator[Changes]:
    memory, accumulation = config.memory, config.optim.accumulation_steps
    if memory.recompute is Recompute.none:
        yield (("memory.recompute", Recompute.keep_attention),)
    if memory.recompute is not Recompute.full:
        yield (("memory.recompute", Recompute.full),)
    if config.data.batch_size > 1:
        steps = accumulation * config.data.batch_size
        yield ("data.batch_size", 1), ("optim.accumulation_steps", steps)
    for stage in (2, 3):
        if stage > memory.zero_stage:
            yield (("memory.zero_stage", stage),)
    if not memory.offload_optimizer:
        yield (("memory.offload_optimizer", True),)
    if not memory.offload_activations and memory.recompute is not Recompute.none:
        yield (("memory.offload_activations", True),)
    if memory.feed_forward_chunks < FEED_FORWARD_CHUNKS:
        yield (("memory.feed_forward_chunks", FEED_FORWARD_CHUNKS),)
    for ranks in (2, 4, 8):
        # More than a node's ranks would talk over the network; accumulation keeps the samples of a step.
        if config.parallel.sequence < ranks <= config.gpus_per_node:
            steps = accumulation * ranks // config.parallel.sequence
            yield ("parallel.sequence", ranks), ("optim.accumulation_steps", steps)


def _larger_devices(config: Plan) -> Iterator[Changes]:
    here = device_by_name(config.device.value)
    for kind in LARGER_DEVICES:
        if device_by_name(kind.value).memory_gib > here.memory_gib:
            yield (("device", kind),)


def _changes_of_result(config: Plan) -> Iterator[Changes]:
    for rank in (32, 16):
        if rank < config.lora.rank:
            yield (("lora.rank", rank),)
    for frames in SHORTER_FRAMES:
        if frames < config.num_frames and not config.data.geometries:
            yield (("num_frames", frames),)
