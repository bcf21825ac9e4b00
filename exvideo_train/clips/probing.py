"""Probing the videos of a stream of clips: in parallel, each once, journaled so that a killed run goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from exvideo_train.clips.container import UnreadableClip, VideoInfo, probe_video
from exvideo_train.clips.journal import journaled_map
from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.workers import Failure

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
    entries = ((companion, video, video, video) for video, companion in videos)
    for companion, found in journaled_map(_probe, entries, journal_path, _from_text, num_workers, timeout_seconds):
        assert found is not None
        yield companion, found


def _probe(video: str) -> VideoInfo | Failure:
    """One worker's task."""
    try:
        return probe_video(video)
    except UnreadableClip as error:
        return Failure(error.reason, error.detail)


def _from_text(text: str) -> VideoInfo | Failure:
    content = json.loads(text)
    return Failure(**content) if "reason" in content else VideoInfo(**content)


def with_info(record: ClipRecord, info: VideoInfo) -> ClipRecord:
    """The record with what probing found; a span that reaches beyond the video ends with it."""
    ends = [moment for moment in (record.end_seconds, info.duration_seconds) if moment is not None]
    return dataclasses.replace(
        record,
        fps=round(info.fps, 6) or None,
        width=info.width,
        height=info.height,
        duration_seconds=round(min(ends) - record.start_seconds, 6) if ends else None,
        codec=info.codec,
    )
