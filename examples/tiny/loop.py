"""What the tiny model's trainings share: a loop that a kill does not hurt, a moving average of weights, a curve."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exvideo_train.files import atomic_write, atomic_write_text

SAVE_SECONDS = 60.0
REPORT_STEPS = 50
WARMUP_STEPS = 100
STATE_NAME, CURVE_NAME = "state.pt", "curve.jsonl"


class Average:
    """An exponential moving average of a model's weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` steps; early ones are forgotten quickly."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter, 1 - decay)

    def copy_to(self, model: nn.Module) -> None:
        """Put the averages in the weights' place."""
        model.load_state_dict(self.weights, strict=False)


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Warm-up, a plateau, and a cosine over the last third, in which most of the error goes.

    On the plateau nothing hangs on ``num_steps``: it can be raised as long as the last third has not begun.
    """
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    begin = 2 * num_steps // 3
    if step < begin:
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - begin) / (num_steps - begin)))


def train(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_of_step: Callable[[int], Tensor],
    *,
    num_steps: int,
    folder: Path,
    score: Callable[[nn.Module], dict[str, float]],
    score_steps: int,
    ema_decay: float,
) -> None:
    """Train to ``num_steps``, or go on from what ``folder`` holds, and leave the averaged weights in ``model``.

    Args:
        loss_of_step: the loss to minimise at a step: a function of its number, so that a resumed run is the same run.
        folder: for the state, written every minute, and the curve, a JSON line every 50 steps.
        score: figures for the curve, with the averaged weights in ``model``.
        score_steps: how often, a multiple of 50.
    """
    average = Average(model, ema_decay)
    step = _resume(folder, model, average, optimizers)
    base_lrs = [[group.setdefault("base_lr", group["lr"]) for group in o.param_groups] for o in optimizers]
    began, first, saved_at, losses = time.monotonic(), step, time.monotonic(), []
    while step < num_steps:
        factor = learning_rate_factor(step, num_steps)
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        average.update(model, step)
        losses.append(loss.item())
        last = step == num_steps
        if step % REPORT_STEPS == 0 or last:
            record = {"step": step, "loss": sum(losses) / len(losses)}
            losses = []
            if step % score_steps == 0 or last:
                record |= _score_average(model, average, score)
            _report(folder, record, num_steps, (time.monotonic() - began) / (step - first))
        if last or time.monotonic() - saved_at > SAVE_SECONDS:
            _save(folder, model, average, optimizers, step)
            saved_at = time.monotonic()
    average.copy_to(model)


def load_average(folder: Path, model: nn.Module) -> int:
    """Put the averaged weights of a training, finished or not, into ``model``; returns its step."""
    state = torch.load(folder / STATE_NAME, weights_only=True)
    model.load_state_dict(state["average"], strict=False)
    return int(state["step"])


def _score_average(
    model: nn.Module, average: Average, score: Callable[[nn.Module], dict[str, float]]
) -> dict[str, float]:
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    average.copy_to(model)
    figures = score(model)
    model.load_state_dict(kept, strict=False)
    return figures


def _report(folder: Path, record: dict[str, Any], num_steps: int, seconds_a_step: float) -> None:
    with open(folder / CURVE_NAME, "a") as curve:
        curve.write(json.dumps(record) + "\n")
    minutes_left = (num_steps - record["step"]) * seconds_a_step / 60
    figures = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
    print(
        f"step {record['step']}/{num_steps}  {figures}  {seconds_a_step:.2f} s a step  {minutes_left:.0f} min left",
        flush=True,
    )


def _save(folder: Path, model: nn.Module, average: Average, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    content = {
        "model": model.state_dict(),
        "average": average.weights,
        "step": step,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    atomic_write(folder / STATE_NAME, lambda temporary: torch.save(content, temporary))


def _resume(folder: Path, model: nn.Module, average: Average, optimizers: list[torch.optim.Optimizer]) -> int:
    """Load what is there; the curve is cut back to the state's step, after which its lines would come twice."""
    folder.mkdir(parents=True, exist_ok=True)
    step = 0
    if (folder / STATE_NAME).exists():
        state = torch.load(folder / STATE_NAME, weights_only=True)
        model.load_state_dict(state["model"])
        average.weights, step = state["average"], int(state["step"])
        for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        print(f"goes on at step {step} of {folder / STATE_NAME}", flush=True)
    curve = folder / CURVE_NAME
    if curve.exists():
        lines = [line for line in curve.read_text().splitlines() if json.loads(line)["step"] <= step]
        atomic_write_text(curve, "".join(line + "\n" for line in lines))
    return step
