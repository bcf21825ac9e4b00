"""Clips that could not be encoded, kept with their reason so that a later run does not stumble over them again.

One small immutable file a clip, written whole: several processes and machines may add at the same time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exvideo_train.clips.record import ClipRecord
from exvideo_train.files import atomic_write_json
from exvideo_train.geometry import Geometry
from exvideo_train.latents.decode import Failure


@dataclass(frozen=True)
class Quarantined:
    """A clip and why it is left out."""

    clip_id: str
    reason: str
    detail: str
    video: str


class Quarantine:
    """The quarantined clips of one geometry of a store."""

    def __init__(self, store_path: Path, geometry: Geometry) -> None:
        self.geometry = geometry
        self.folder = store_path / "reports" / "quarantine" / geometry.name

    def _path(self, clip_id: str) -> Path:
        return self.folder / clip_id[:3] / f"{clip_id}.json"

    def add(self, record: ClipRecord, failure: Failure) -> None:
        """Record why a clip is left out."""
        content = {
            "clip_id": record.clip_id,
            "reason": failure.reason,
            "detail": failure.detail,
            "video": record.video,
        }
        atomic_write_json(self._path(record.clip_id), content)

    def remove(self, clip_id: str) -> None:
        """Let a clip be tried again."""
        self._path(clip_id).unlink(missing_ok=True)

    def __contains__(self, clip_id: str) -> bool:
        return self._path(clip_id).exists()

    def __iter__(self) -> Iterator[Quarantined]:
        """Quarantined clips, sorted by id."""
        if not self.folder.is_dir():
            return
        for shard in sorted(self.folder.iterdir()):
            for path in sorted(shard.glob("[!.]*.json")):
                yield Quarantined(**json.loads(path.read_text()))

    def ids(self) -> set[str]:
        """Ids of all quarantined clips."""
        if not self.folder.is_dir():
            return set()
        return {path.stem for shard in self.folder.iterdir() for path in shard.glob("[!.]*.json")}
