from __future__ import annotations

import time

import pytest
import torch

from exvideo_train.training.meters import PHASES, SpeedMeter


def test_phases_rates_and_mfu() -> None:
    meter = SpeedMeter(torch.device("cpu"), world_size=4, sequence_size=2, peak_flops=1e12)
    for _ in range(2):
        with meter.phase("data"):
            time.sleep(0.02)
        with meter.phase("forward"):
            time.sleep(0.04)
        meter.add_samples(num_samples=3, video_tokens=300, flops=6e9)
        meter.add_step()
    speed = meter.read()
    assert 0.06 <= speed.step_seconds < 0.2
    assert speed.phase_seconds["data"] >= 0.02
    assert speed.phase_seconds["forward"] >= 0.04
    assert set(speed.phase_seconds) == {*PHASES, "other"}
    assert sum(speed.phase_seconds.values()) == pytest.approx(speed.step_seconds, rel=1e-6)
    seconds = 2 * speed.step_seconds
    # Two data groups of this one's size; a sample's FLOPs are shared by the two ranks of a sequence group.
    assert speed.samples_per_second == pytest.approx(2 * 6 / seconds)
    assert speed.video_tokens_per_second == pytest.approx(2 * 600 / seconds)
    assert speed.achieved_tflops == pytest.approx(12e9 / 2 / seconds / 1e12)
    assert speed.mfu == pytest.approx(12e9 / 2 / seconds / 1e12)
    assert speed.peak_allocated_gib > 0


def test_reading_begins_anew() -> None:
    meter = SpeedMeter(torch.device("cpu"), world_size=1, sequence_size=1, peak_flops=None)
    time.sleep(0.05)
    meter.reset()
    meter.add_step()
    speed = meter.read()
    assert speed.step_seconds < 0.05
    assert speed.mfu is None
    assert meter.read().samples_per_second == 0.0


def test_a_phase_that_fails_does_not_hide_the_error() -> None:
    meter = SpeedMeter(torch.device("cpu"), world_size=1, sequence_size=1, peak_flops=None)
    with pytest.raises(KeyError), meter.phase("data"):
        raise KeyError("x")
