"""The progress bar of encode_latents: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

LOG_SECONDS = 30.0
POLL_SECONDS = 10.0


class Progress:
    """Counts settled clips; call it with each clip's id. A clip settled twice counts once.

    Args:
        num_clips: clips of the run.
        num_unsettled: asked now and then when other machines work on the same clips; None when none do.
    """

    def __init__(self, num_clips: int, num_unsettled: Callable[[], int] | None = None) -> None:
        from tqdm import tqdm

        on_terminal = sys.stderr.isatty()
        self._num_clips = num_clips
        self._settled: set[str] = set()
        self._closed = threading.Event()
        self._bar: Any = tqdm(
            total=num_clips,
            unit="clip",
            desc="encoding",
            dynamic_ncols=on_terminal,
            mininterval=0.5 if on_terminal else LOG_SECONDS,
        )
        self._polls = num_unsettled is not None
        if num_unsettled is not None:
            threading.Thread(target=self._poll, args=(num_unsettled,), daemon=True).start()

    def __call__(self, clip_id: str) -> None:
        if not self._polls and clip_id not in self._settled:
            self._settled.add(clip_id)
            self._bar.update()

    def _poll(self, num_unsettled: Callable[[], int]) -> None:
        while not self._closed.wait(POLL_SECONDS):
            self._bar.update(max(0, self._num_clips - num_unsettled() - self._bar.n))

    def close(self) -> None:
        self._closed.set()
        self._bar.close()
