"""What comes of a data set that is attacked: the clips that are left, and what was dropped or noted."""

from __future__ import annotations

from collections.abc import Mapping

from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.sources.base import Source


def parse_all(source: Source) -> tuple[list[ClipRecord], Mapping[str, str]]:
    """Clips, and what was dropped: place and number -> "reason: detail"."""
    clips: list[ClipRecord] = []
    drops: dict[str, str] = {}
    for piece in source.pieces():
        for entry in source.parse(piece):
            if isinstance(entry, ClipRecord):
                # What a manifest cannot hold would end the build.
                entry.to_json().encode()
                entry.caption.encode()
                clips.append(entry)
            else:
                drops[f"{len(drops)} {entry.where}"] = f"{entry.reason}: {entry.detail}"
    return clips, drops
