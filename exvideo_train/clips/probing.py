"""Probing the videos of a stream of clips: in parallel, each once, journaled so that a killed run goes on."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from exvideo_train.clips.container import PASSING_REASONS, UnreadableClip, VideoInfo, probe_video
from exvideo_train.clips.journal import Journal, file_stamp
from exvideo_train.clips.workers import Failure, parallel_map

Companion = TypeVar("Companion")


def probe_videos(
    videos: Iterable[tuple[str, Companion]], journal_path: Path, num_workers: int, timeout_seconds: float
) -> Iterator[tuple[Companion, VideoInfo | Failure]]:
    """Probe a stream of videos, in their order.

    Args:
        videos: (path, whatever belongs to it) pairs.
        journal_path: what was found, for the next run if this one is killed.
        num_workers: processes, 0 for one a core.
        timeout_seconds: for one video.

    Yields:
        (what belongs to the video, what was found or why nothing was).
    """
    waiting: deque[tuple[Companion, str, VideoInfo | Failure | None]] = deque()
    with Journal(journal_path) as journal:

        def tasks() -> Iterator[str]:
            for video, companion in videos:
                stamp = file_stamp(video)
                known = journal.get(video, stamp, _from_text)
                waiting.append((companion, stamp, known))
                # An empty name is a task that costs nothing: it keeps the order of what is known already.
                yield "" if known is not None else video

        for video, found in parallel_map(_probe, tasks(), num_workers, timeout_seconds):
            companion, stamp, known = waiting.popleft()
            if known is not None:
                yield companion, known
                continue
            assert found is not None
            if not (isinstance(found, Failure) and found.reason in PASSING_REASONS):
                journal.put(video, stamp, json.dumps(dataclasses.asdict(found)))
            yield companion, found


def _probe(video: str) -> VideoInfo | Failure | None:
    """One worker's task."""
    if not video:
        return None
    try:
        return probe_video(video)
    except UnreadableClip as error:
        return Failure(error.reason, error.detail)


def _from_text(text: str) -> VideoInfo | Failure:
    content = json.loads(text)
    return Failure(**content) if "reason" in content else VideoInfo(**content)
