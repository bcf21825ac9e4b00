"""Clips that a store leaves out, each with its reason, in ``reports/quarantine/<geometry>/<id[:3]>/<id>.json``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exvideo_train.clips import bounds
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_json, read_regular, short
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import UnusableLatent
from exvideo_train.latents.store import LatentStore
from exvideo_train.latents.untrusted import (
    CLIP_ID,
    TEXT,
    check_fields,
    check_inside,
    exists_inside,
    is_folder,
    list_folder,
    set_aside,
)

if TYPE_CHECKING:
    from exvideo_train.clips.record import ClipRecord
    from exvideo_train.clips.workers import Failure

_MAX_RECORD_BYTES = 1 << 20
_RECORD_FIELDS = {"clip_id": CLIP_ID, "reason": TEXT, "detail": TEXT, "video": TEXT}


@dataclass(frozen=True)
class Quarantined:
    """A clip and why it is left out."""

    clip_id: str
    reason: str
    detail: str
    video: str


class Quarantine:
    """The quarantined clips of one geometry of a store: a later run does not stumble over them again.

    One small immutable file a clip, written whole: several processes and machines may add at the same time.
    """

    def __init__(self, store_path: Path, geometry: Geometry) -> None:
        self.store_path = store_path
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
        """Let a clip be tried again.

        Raises:
            UserError: its record cannot be deleted.
        """
        path = self._path(clip_id)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be deleted ({error.strerror}); delete it, then run again") from error

    def __contains__(self, clip_id: str) -> bool:
        return exists_inside(self.store_path, self._path(clip_id))

    def __iter__(self) -> Iterator[Quarantined]:
        """Quarantined clips, sorted by id.

        One whose record cannot be used is of the reason ``damaged_record``: it stays out until it is tried again.
        """
        for shard in list_folder(self.store_path, self.folder):
            if not is_folder(shard):
                continue
            for entry in list_folder(self.store_path, self.folder / shard.name):
                clip_id = entry.name.removesuffix(".json")
                if clip_id != entry.name and clip_id[:3] == shard.name and CLIP_ID.accepts(clip_id):
                    yield self._read(clip_id)

    def _read(self, clip_id: str) -> Quarantined:
        path = self._path(clip_id)
        try:
            check_inside(self.store_path, path)
            content = check_fields(
                bounds.parse_row(read_regular(path, _MAX_RECORD_BYTES)), _RECORD_FIELDS, others=False
            )
            if content["clip_id"] != clip_id:
                raise ValueError(f"clip_id={short(content['clip_id'])}: the record is of another clip")
        except (ValueError, OSError) as error:
            detail = f"{path}: {error}; retry_quarantined=true tries the clip again"
            return Quarantined(clip_id, "damaged_record", detail, "")
        return Quarantined(**content)

    def ids(self) -> set[str]:
        """Ids of all quarantined clips."""
        return {entry.clip_id for entry in self}


def is_settled(store: LatentStore, quarantine: Quarantine, record: ClipRecord) -> bool:
    """Whether a process that died after taking a clip has dealt with it."""
    if record.clip_id in quarantine:
        return True
    try:
        return store.read_entry(record.clip_id, quarantine.geometry).is_of(record)
    except UnusableLatent:
        # The plan gives out no clip whose file could not be read: one that cannot now was to be replaced.
        return False


def quarantine_clip(store: LatentStore, quarantine: Quarantine, record: ClipRecord, failure: Failure) -> None:
    """Leave a clip out with its reason; a latent of its former caption or rate moves aside.

    Left in place it would come back into the index when that is written anew from the files.
    """
    quarantine.add(record, failure)
    set_aside(store.path, store.clip_path(record.clip_id, quarantine.geometry))
