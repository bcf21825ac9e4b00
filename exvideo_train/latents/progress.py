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
        self._thread: threading.Thread | None = None
        self._bar: Any = tqdm(
            total=num_clips,
            unit="clip",
            desc="encoding",
            dynamic_ncols=on_terminal,
            mininterval=0.5 if on_terminal else LOG_SECONDS,
        )
        self._num_unsettled = num_unsettled
        if num_unsettled is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def __call__(self, clip_id: str) -> None:
        if self._num_unsettled is None and clip_id not in self._settled:
            self._settled.add(clip_id)
            self._bar.update()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            self._poll()

    def _poll(self) -> None:
        if self._num_unsettled is not None:
            self._bar.update(max(0, self._num_clips - self._num_unsettled() - self._bar.n))

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        self._poll()
        self._bar.close()
