"""wandb and TensorBoard behind one call: each is a choice of ``logger``, imported only when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from exvideo_train.config.experiment import BoardsConfig


class Boards:
    """Those of the two that the options ask for.

    Args:
        folder: they write to wandb/ and tensorboard/ in it.
        options: which of them.
        settings: what the figures come from, for wandb.
        first_step: points of TensorBoard from here on, left by an earlier process, are dropped.
        run_id: of wandb's run that is gone on with; None begins one.
        axes: groups of names ("samples" for "samples/...") that wandb draws over another number than its own step, and
            the name of that number.
    """

    def __init__(
        self,
        folder: Path,
        options: BoardsConfig,
        settings: Mapping[str, Any],
        *,
        first_step: int = 0,
        run_id: str | None = None,
        axes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._wandb: Any = None
        self._tensorboard: Any = None
        self._newest_step = 0
        if options.wandb:
            import wandb

            self._wandb = wandb.init(
                project=options.wandb_project,
                name=options.wandb_name or folder.resolve().name,
                dir=str(folder),
                config=dict(settings),
                id=run_id,
                resume="allow" if run_id else None,
            )
            for group, axis in axes.items():
                self._wandb.define_metric(axis)
                self._wandb.define_metric(f"{group}/*", step_metric=axis)
        if options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Finite numbers of a step, nested names joined by "/"."""
        numbers = dict(_numbers(values))
        # wandb takes no step before its newest; what comes late has an axis of its own.
        self._newest_step = max(step, self._newest_step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=self._newest_step)
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def tell(self, name: str, text: str) -> None:
        """Words that belong to the whole, in Markdown."""
        if self._wandb is not None:
            self._wandb.summary[name] = text
        if self._tensorboard is not None:
            self._tensorboard.add_text(name, text)

    def close(self) -> None:
        """Write out what is left."""
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            found += _numbers({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found.append((prefix + name, float(value)))
    return found
