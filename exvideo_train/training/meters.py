"""What a step costs: time by phase, rates, memory, achieved FLOP/s.

Nothing here synchronises the device between logs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

PHASES = ("data", "forward", "backward", "optimizer")
GIB = 2**30


@dataclass(frozen=True)
class Speed:
    """Means over the steps since the last reading.

    Attributes:
        step_seconds: wall time of an optimizer step, everything included.
        phase_seconds: by phase; "other" is the rest (logging, checkpoint copies, validation).
        samples_per_second, video_tokens_per_second: over all ranks.
        achieved_tflops: of this rank's device, recomputation not counted; mfu is its share of the device's peak,
            None where that is unknown.
        peak_allocated_gib, peak_reserved_gib: device memory since start (host memory of the process on a CPU).
    """

    step_seconds: float
    phase_seconds: dict[str, float]
    samples_per_second: float
    video_tokens_per_second: float
    achieved_tflops: float
    mfu: float | None
    peak_allocated_gib: float
    peak_reserved_gib: float


class SpeedMeter:
    """Times phases; on a GPU by events that are read only when :meth:`read` is called.

    Args:
        device: of this rank.
        world_size: all ranks; sequence_size of them share a sample's work.
        peak_flops: of the device in the compute dtype, FLOP/s, None if unknown.
    """

    def __init__(self, device: torch.device, world_size: int, sequence_size: int, peak_flops: float | None) -> None:
        self.device = device
        self.world_size = world_size
        self.sequence_size = sequence_size
        self.peak_flops = peak_flops
        self.reset()

    def reset(self) -> None:
        """Forget what was measured: the next reading begins here."""
        self._started = time.perf_counter()
        self._host_seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._num_steps = 0
        self._num_samples = 0
        self._video_tokens = 0
        self._flops = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step."""
        assert name in PHASES, name
        started = time.perf_counter()
        if self.device.type == "cuda" and name != "data":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        yield
        self._host_seconds[name] += time.perf_counter() - started

    def add_samples(self, num_samples: int, video_tokens: int, flops: float) -> None:
        """Count this data rank's samples of a micro-step, their video tokens and the FLOPs they take."""
        self._num_samples += num_samples
        self._video_tokens += video_tokens
        self._flops += flops

    def add_step(self) -> None:
        """Count a finished optimizer step."""
        self._num_steps += 1

    def read(self) -> Speed:
        """Means since the last call. Synchronises the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self._started
        phases = dict(self._host_seconds)
        for name, begin, end in self._events:
            phases[name] = phases.get(name, 0.0) + begin.elapsed_time(end) / 1000
        steps = max(1, self._num_steps)
        phases["other"] = max(0.0, seconds - sum(phases.values()))
        data_size = self.world_size // self.sequence_size
        flops_per_second = self._flops / self.sequence_size / seconds
        allocated, reserved = peak_memory_gib(self.device)
        speed = Speed(
            step_seconds=seconds / steps,
            phase_seconds={name: phases.get(name, 0.0) / steps for name in (*PHASES, "other")},
            samples_per_second=self._num_samples * data_size / seconds,
            video_tokens_per_second=self._video_tokens * data_size / seconds,
            achieved_tflops=flops_per_second / 1e12,
            mfu=flops_per_second / self.peak_flops if self.peak_flops else None,
            peak_allocated_gib=allocated,
            peak_reserved_gib=reserved,
        )
        self.reset()
        return speed


def peak_memory_gib(device: torch.device) -> tuple[float, float]:
    """Peak (allocated, reserved) device memory in GiB; on a CPU the process's present resident memory, twice."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB
    resident = psutil.Process().memory_info().rss / GIB
    return resident, resident
