"""What a run of encode_latents has to do: the clips that are in the manifest and not in the store.

Axis letters: C channel, T latent frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from exvideo_train.clips.record import ClipRecord, read_manifest
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import CorruptLatent, IndexEntry, MissingLatent, UnusableLatent, entry_of
from exvideo_train.latents.quarantine import Quarantine
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.latents.store import LatentStore
from exvideo_train.latents.untrusted import is_folder, list_folder, set_aside


@dataclass
class EncodePlan:
    """Counts are of the manifest's clips.

    Attributes:
        pending: clips to encode, those of equal captions side by side.
        num_clips: different clips in the manifest.
        num_repeated: lines that name a clip again.
        num_reused: already encoded with their present caption and rate.
        num_changed: encoded, but with another caption or sampling rate: among the pending.
        outdated: by id, all clips whose latents are of another caption or rate, those left for later included.
        num_held_back: quarantined by an earlier run, by reason.
        num_later: left for a later run by max_clips.
        damaged: why, by id, of files in the store that are to be moved aside, in the manifest or not.
        unreadable: the same of files that cannot be read and are left alone.
        num_unreadable: clips of the manifest among these.
    """

    pending: list[ClipRecord] = field(default_factory=list)
    num_clips: int = 0
    num_repeated: int = 0
    num_reused: int = 0
    num_changed: int = 0
    outdated: dict[str, ClipRecord] = field(default_factory=dict)
    num_held_back: Counter[str] = field(default_factory=Counter)
    num_later: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    num_unreadable: int = 0
    bytes_per_clip: int = 0
    free_bytes: int = 0

    @property
    def bytes_needed(self) -> int:
        return (len(self.pending) + self.num_later) * self.bytes_per_clip

    def describe(self, settings: EncodeSettings) -> str:
        """The plan as a few lines for a person."""
        held_back = ", ".join(f"{n} {reason}" for reason, n in sorted(self.num_held_back.items()))
        lines = [
            f"store        {settings.store_path}",
            f"model        {settings.model_path}",
            f"geometry     {settings.geometry.name}, {settings.options.encoder_dtype.value}, "
            f"tiling {'on' if settings.options.tiling else 'off'}",
            f"clips        {self.num_clips} in the manifest ({self.num_repeated} repeated lines ignored)",
            f"  encoded    {self.num_reused} already",
            f"  to encode  {len(self.pending)} ({self.num_changed} of them for a changed caption or rate)",
            f"  held back  {sum(self.num_held_back.values())} quarantined{f': {held_back}' if held_back else ''}",
        ]
        if self.num_held_back:
            lines.append("             (retry_quarantined=true tries them again)")
        if self.num_later:
            lines.append(f"  later      {self.num_later} beyond max_clips")
        lines += [f"  damaged    {reason}" for reason in self.damaged.values()]
        lines += [f"  unreadable {reason}" for reason in self.unreadable.values()]
        need, free = self.bytes_needed / 2**30, self.free_bytes / 2**30
        lines.append(
            f"disk         {need:.2f} GiB needed ({self.bytes_per_clip / 1e6:.2f} MB a clip), {free:.1f} GiB free"
        )
        if self.bytes_needed > self.free_bytes:
            lines.append("warning: the disk is too small for all clips; the run will stop when it is full")
        return "\n".join(lines)


@dataclass
class Existing:
    """What lies under the names of a geometry's clips.

    Attributes:
        entries: whole files, by the index or else by their headers.
        damaged: why, by clip id: to be moved aside and encoded again.
        unreadable: why, by clip id: may be whole, so they are neither taken for missing nor written over.
        decord_refusals: of the whole files that are not in the index, by clip id: why PyAV decoded the clip in decord's
            place, None if it did not.
    """

    entries: dict[str, IndexEntry] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    decord_refusals: dict[str, str | None] = field(default_factory=dict)


def existing_clips(store: LatentStore, geometry: Geometry) -> Existing:
    """Sort the files of a geometry; opens those alone that are not in the index.

    Raises:
        UserError: a folder of theirs is a link or cannot be listed, or the index cannot be read.
    """
    indexed = store.read_index()
    existing = Existing()
    for clip_id in store.clip_ids_on_disk(geometry):
        entry = indexed.get((geometry.name, clip_id))
        try:
            if entry is None:
                header = store.read_header(clip_id, geometry)
                entry = entry_of(header.content, header.num_bytes)
                existing.decord_refusals[clip_id] = header.content.get("decord_refusal")
            existing.entries[clip_id] = entry
        except CorruptLatent as error:
            existing.damaged[clip_id] = str(error)
        except MissingLatent:
            continue
        except UnusableLatent as error:
            existing.unreadable[clip_id] = str(error)
    return existing


def make_plan(
    settings: EncodeSettings, store: LatentStore, manifest: Path, retry_quarantined: bool, max_clips: int
) -> EncodePlan:
    """Compare a manifest with a store; reads only.

    Raises:
        UserError: the manifest is missing, empty or malformed.
    """
    plan = EncodePlan(bytes_per_clip=settings.bytes_per_clip(), free_bytes=_free_bytes(settings.store_path))
    geometry = settings.geometry
    existing = existing_clips(store, geometry) if geometry.name in store.fingerprints else Existing()
    plan.damaged, plan.unreadable = existing.damaged, existing.unreadable
    quarantine = Quarantine(settings.store_path, geometry)
    reasons = {} if retry_quarantined else {entry.clip_id: entry.reason for entry in quarantine}
    by_caption: dict[str, list[ClipRecord]] = {}
    seen: set[str] = set()
    for record in read_manifest(manifest):
        if record.clip_id in seen:
            plan.num_repeated += 1
            continue
        seen.add(record.clip_id)
        entry = existing.entries.get(record.clip_id)
        if entry is not None and entry.is_of(record):
            plan.num_reused += 1
            continue
        if entry is not None:
            plan.outdated[record.clip_id] = record
        if record.clip_id in existing.unreadable:
            plan.num_unreadable += 1
        elif record.clip_id in reasons:
            plan.num_held_back[reasons[record.clip_id]] += 1
        else:
            plan.num_changed += entry is not None
            # Work lists lie elsewhere than the manifest: its relative paths must not move with them.
            by_caption.setdefault(record.caption, []).append(
                dataclasses.replace(record, video=os.path.abspath(record.video))
            )
    plan.num_clips = len(seen)
    # In the order of the manifest, which keeps neighbours of one video or shard together, but for shared captions.
    plan.pending = [record for records in by_caption.values() for record in records]
    if max_clips:
        plan.num_later = max(0, len(plan.pending) - max_clips)
        plan.pending = plan.pending[:max_clips]
    return plan


def _free_bytes(path: Path) -> int:
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def sweep_temporary_files(store: LatentStore, geometry: Geometry) -> None:
    """Delete what killed writers left behind. Nobody may be writing meanwhile."""
    clips = store.path / "clips" / geometry.name
    folders = [store.path, *(Path(entry.path) for entry in list_folder(store.path, clips) if is_folder(entry))]
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def set_damaged_aside(store: LatentStore, geometry: Geometry, clip_ids: Iterable[str]) -> None:
    """Move damaged files to ``damaged/``, the empty prompt's too if training would refuse it: they are encoded anew.

    Raises:
        UserError: the empty prompt's file cannot be read, or a file cannot be moved.
    """
    paths = [store.clip_path(clip_id, geometry) for clip_id in clip_ids]
    try:
        store.empty_prompt(verify=True)
    except MissingLatent:
        pass
    except CorruptLatent as error:
        print(f"note: {error}", flush=True)
        paths.append(store.empty_prompt_path)
    for path in paths:
        if (moved := set_aside(store.path, path)) is not None:
            print(f"note: damaged and no longer used; kept as {moved}", flush=True)


def take_from_index(store: LatentStore, geometry: Geometry, clip_ids: Collection[str]) -> None:
    """Leave clips out of the index before their files are replaced.

    At no moment may the index name a file that holds something else, nor training read an outdated latent. The files
    stay until they are replaced: a manifest given by mistake costs nothing.
    """
    entries = store.read_index()
    left = [entry for entry in entries.values() if entry.geometry != geometry.name or entry.clip_id not in clip_ids]
    if len(left) < len(entries):
        store.write_index(left)


def write_index(store: LatentStore, geometry: Geometry, outdated: Mapping[str, ClipRecord]) -> Existing:
    """Bring the index up to date with a geometry's files; returns these, and as entries those in the index.

    Args:
        outdated: clips as they should be by id; their files are left out unless they have been replaced.
    """
    existing = existing_clips(store, geometry)
    existing.entries = {
        clip_id: entry
        for clip_id, entry in existing.entries.items()
        if clip_id not in outdated or entry.is_of(outdated[clip_id])
    }
    others = [entry for entry in store.read_index().values() if entry.geometry != geometry.name]
    store.write_index([*others, *existing.entries.values()])
    return existing
