from __future__ import annotations

import pytest

from exvideo_train.config.experiment import LearningRateSchedule, OptimConfig
from exvideo_train.training.learning_rate import learning_rate


def rates(schedule: LearningRateSchedule, max_steps: int = 11, warmup: int = 4) -> list[float]:
    optim = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=warmup, final_lr_ratio=0.1)
    return [learning_rate(step, max_steps, optim) for step in range(max_steps)]


@pytest.mark.parametrize("schedule", list(LearningRateSchedule))
def test_warm_up_is_linear_and_the_peak_comes_after_it(schedule: LearningRateSchedule) -> None:
    assert rates(schedule)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_shapes_by_hand() -> None:
    assert rates(LearningRateSchedule.constant)[4:] == [1.0] * 7
    assert rates(LearningRateSchedule.linear)[4:] == pytest.approx([1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1])
    assert rates(LearningRateSchedule.cosine)[4:] == pytest.approx(
        [1.0, 0.939711, 0.775, 0.55, 0.325, 0.160289, 0.1], abs=1e-6
    )


def test_no_warm_up_and_steps_past_the_end() -> None:
    assert rates(LearningRateSchedule.linear, max_steps=2, warmup=0) == pytest.approx([1.0, 0.1])
    assert learning_rate(500, 10, OptimConfig(lr=1.0, warmup_steps=0, final_lr_ratio=0.1)) == pytest.approx(0.1)
    assert rates(LearningRateSchedule.cosine, max_steps=1, warmup=0) == [1.0]
