"""The learning rate as a function of the step alone, so that nothing about it needs saving."""

from __future__ import annotations

import math

from exvideo_train.config.experiment import LearningRateSchedule, OptimConfig


def learning_rate(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Learning rate of the update that follows ``step`` updates: linear warm-up, then the schedule's shape.

    The first update already has 1/warmup_steps of the peak, and the last one final_lr_ratio of it.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule is LearningRateSchedule.constant:
        return optim.lr
    decay_steps = max(1, max_steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / decay_steps)
    shape = 1.0 - progress
    if optim.schedule is LearningRateSchedule.cosine:
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr * (optim.final_lr_ratio + (1.0 - optim.final_lr_ratio) * shape)
