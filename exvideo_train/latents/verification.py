"""Checking a latent store.

Only a file that was read and is wrong is damaged, and moves to ``damaged/``. What could not be read is left as it is
and keeps its line in the index: the next look may find it whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from exvideo_train.errors import UnreadableFile, UserError
from exvideo_train.files import atomic_write
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import (
    CorruptLatent,
    IndexEntry,
    MissingLatent,
    UnusableLatent,
    check_finite,
    read_index_lines,
)
from exvideo_train.latents.store import LatentStore, clip_ids_in
from exvideo_train.latents.untrusted import (
    DAMAGED_FOLDER,
    LINK_REMEDY,
    hold_store,
    is_folder,
    list_folder,
    place_aside,
    set_aside,
)

Index = Mapping[tuple[str, str], IndexEntry]
_OF_A_STORE = ("store.json", "index.jsonl", "empty_prompt.safetensors")
_STRAYS_SHOWN = 20


@dataclass
class GeometryFindings:
    """What was found in one geometry: clip ids, and reasons of the damaged and of those that could not be read."""

    geometry: Geometry
    whole: list[IndexEntry] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    not_indexed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrongly_indexed: list[str] = field(default_factory=list)

    @property
    def has_damage(self) -> bool:
        """Whether there is something to repair."""
        return bool(self.damaged or self.not_indexed or self.missing or self.wrongly_indexed)

    def describe(self) -> str:
        """A line of counts, and a line a damaged or unreadable file."""
        counts = (
            f"{self.geometry.name}: {len(self.whole)} whole, {len(self.damaged)} damaged, {len(self.not_indexed)} not "
            f"in the index, {len(self.missing)} indexed but missing, {len(self.wrongly_indexed)} wrongly indexed, "
            f"{len(self.unreadable)} that cannot be read"
        )
        reasons = [f"  damaged: {reason}" for reason in self.damaged.values()]
        reasons += [f"  cannot be read: {reason}" for reason in self.unreadable.values()]
        return "\n".join([counts, *reasons])


@dataclass
class Survey:
    """What lies in a store's folders, by name alone.

    Attributes:
        clip_ids: of each geometry, sorted.
        links: paths in the store of links, which are not followed.
        strays: paths in the store of what is no part of one.
        unreadable: why a folder cannot be listed.
    """

    clip_ids: dict[str, list[str]] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@dataclass
class StoreFindings:
    """What was found in a store.

    Attributes:
        survey: links, strays and folders that cannot be listed.
        empty_prompt_damage: why training could not use the empty prompt's file; None when it can.
        empty_prompt_unreadable: why the empty prompt's file could not be read; None when it could.
        index_damage: what is wrong with lines of the index.
        index_unreadable: why the index could not be read; None when it could. Nothing is repaired then.
        moved: where repair put damaged files, and a copy of a damaged index.
    """

    geometries: list[GeometryFindings]
    survey: Survey
    empty_prompt_damage: str | None = None
    empty_prompt_unreadable: str | None = None
    index_damage: list[str] = field(default_factory=list)
    index_unreadable: str | None = None
    moved: list[Path] = field(default_factory=list)

    @property
    def unreadable(self) -> list[str]:
        """Why parts of the store could not be read: what repair must leave as it is."""
        parts = [self.index_unreadable, self.empty_prompt_unreadable, *self.survey.unreadable]
        parts += [reason for result in self.geometries for reason in result.unreadable.values()]
        return [part for part in parts if part is not None]

    @property
    def is_repairable(self) -> bool:
        """Whether nothing is left to do after a repair but to encode."""
        return not (self.unreadable or self.survey.links)

    @property
    def has_damage(self) -> bool:
        """Whether there is something to repair."""
        damage = self.empty_prompt_damage is not None or bool(self.index_damage)
        return damage or any(result.has_damage for result in self.geometries)

    @property
    def is_clean(self) -> bool:
        return self.is_repairable and not self.has_damage

    def describe(self) -> str:
        """The findings a geometry, and whatever else is not as it should be."""
        lines = [result.describe() for result in self.geometries]
        if self.empty_prompt_damage is not None:
            lines.append(f"empty prompt: missing or damaged\n  {self.empty_prompt_damage}")
        if self.empty_prompt_unreadable is not None:
            lines.append(f"empty prompt: cannot be read\n  {self.empty_prompt_unreadable}")
        if self.index_unreadable is not None:
            lines.append(f"index: cannot be read, so nothing can be repaired\n  {self.index_unreadable}")
        lines += _listing("index: damaged lines", self.index_damage)
        lines += _listing("folders that cannot be listed", self.survey.unreadable)
        links = [f"{link!r}: {LINK_REMEDY}" for link in self.survey.links]
        lines += _listing("links, which are not followed", links)
        strays = [repr(stray) for stray in self.survey.strays]
        lines += _listing("no part of the store, left as they are", strays[:_STRAYS_SHOWN], len(strays))
        return "\n".join(lines)


def _listing(title: str, items: Sequence[str], count: int | None = None) -> list[str]:
    return [f"{title}: {len(items) if count is None else count}", *(f"  {item}" for item in items)] if items else []


def verify_store(store: LatentStore, repair: bool, num_workers: int = 0) -> StoreFindings:
    """Read every file, compare it with its checksum and with the index.

    Args:
        repair: move damaged files, the empty prompt's included, to ``damaged/``, and write the index anew from the
            whole ones and from the lines of those that cannot be read.
        num_workers: reading threads, 0 for one a core.

    Raises:
        UserError: the store cannot be repaired: it is not writable, or another process works in it.
    """
    found = StoreFindings([], survey_store(store))
    indexed: Index = {}
    try:
        indexed, damage = read_index_lines(store.path, store.index_path)
        found.index_damage += damage
    except UnreadableFile as unreadable:
        found.index_unreadable = str(unreadable)
    names = {geometry.name for geometry in store.geometries()}
    found.index_damage += [
        f"clip {clip_id} is of {name!r}, which store.json has not" for name, clip_id in indexed if name not in names
    ]
    for geometry in store.geometries():
        on_disk = found.survey.clip_ids.get(geometry.name, [])
        found.geometries.append(_verify_geometry(store, geometry, on_disk, indexed, num_workers))
    error = _check_empty_prompt(store)
    if isinstance(error, CorruptLatent | MissingLatent):
        found.empty_prompt_damage = str(error)
    elif error is not None:
        found.empty_prompt_unreadable = str(error)
    if repair and found.index_unreadable is None and (found.has_damage or not store.index_path.exists()):
        with hold_store(store.path):
            _repair(store, found, indexed)
    return found


def _repair(store: LatentStore, found: StoreFindings, indexed: Index) -> None:
    if read_index_lines(store.path, store.index_path)[0] != indexed:
        raise UserError(f"latents={store.path}: the store was changed while it was verified; verify it again")
    if found.index_damage:
        # A copy: without an index, lines of files that cannot be read now would be lost if this were interrupted.
        copy = place_aside(store.path, store.index_path)
        atomic_write(copy, partial(shutil.copyfile, store.index_path))
        found.moved.append(copy)
    kept = [
        entry
        for result in found.geometries
        for clip_id in result.unreadable
        if (entry := indexed.get((result.geometry.name, clip_id))) is not None
    ]
    # The index first: at no moment may it name a file that is gone.
    store.write_index([*kept, *(entry for result in found.geometries for entry in result.whole)])
    # Read once more: a disk may have given other bytes once.
    paths = [
        store.clip_path(clip_id, result.geometry)
        for result in found.geometries
        for clip_id in result.damaged
        if isinstance(_check_clip(store, result.geometry, clip_id), CorruptLatent)
    ]
    if isinstance(_check_empty_prompt(store), CorruptLatent):
        paths.append(store.empty_prompt_path)
    found.moved += [moved for path in paths if (moved := set_aside(store.path, path)) is not None]


def _check_clip(store: LatentStore, geometry: Geometry, clip_id: str) -> IndexEntry | UnusableLatent:
    try:
        clip = store.read(clip_id, geometry, verify=True)
        check_finite(store.clip_path(clip_id, geometry), clip.tensors)
        return store.read_entry(clip_id, geometry)
    except UnusableLatent as error:
        return error


def _check_empty_prompt(store: LatentStore) -> UnusableLatent | None:
    try:
        store.empty_prompt(verify=True)
    except UnusableLatent as error:
        return error
    return None


def _verify_geometry(
    store: LatentStore, geometry: Geometry, on_disk: Sequence[str], indexed: Index, num_workers: int
) -> GeometryFindings:
    result = GeometryFindings(geometry)
    # The indexed ones too: of a folder that cannot be listed, some files may be read, and none may look missing.
    ids = sorted({*on_disk, *(clip_id for name, clip_id in indexed if name == geometry.name)})
    # Hashing and reading files release the interpreter lock.
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        for clip_id, outcome in zip(ids, pool.map(partial(_check_clip, store, geometry), ids), strict=True):
            entry = indexed.get((geometry.name, clip_id))
            if isinstance(outcome, IndexEntry):
                result.whole.append(outcome)
                if entry is None:
                    result.not_indexed.append(clip_id)
                elif entry != outcome:
                    result.wrongly_indexed.append(clip_id)
            elif isinstance(outcome, CorruptLatent):
                result.damaged[clip_id] = str(outcome)
            elif not isinstance(outcome, MissingLatent):
                result.unreadable[clip_id] = str(outcome)
            elif entry is not None:
                result.missing.append(clip_id)
    return result


def survey_store(store: LatentStore) -> Survey:
    """Look through a store's folders; opens no file and follows no link."""
    survey = Survey()
    names = {geometry.name for geometry in store.geometries()}
    for top in _list(store, store.path, survey):
        if top.name == "clips" and is_folder(top):
            _survey_clips(store, Path(top.path), names, survey)
        elif top.name == "reports" and is_folder(top):
            _survey_links(store, Path(top.path), survey)
        elif top.name not in (*_OF_A_STORE, DAMAGED_FOLDER):
            survey.strays.append(top.name)
    return survey


def _survey_clips(store: LatentStore, clips: Path, names: set[str], survey: Survey) -> None:
    for geometry in _list(store, clips, survey):
        if geometry.name not in names or not is_folder(geometry):
            survey.strays.append(f"clips/{geometry.name}")
            continue
        ids = survey.clip_ids.setdefault(geometry.name, [])
        for shard in _list(store, Path(geometry.path), survey):
            entries = _list(store, Path(shard.path), survey) if is_folder(shard) else []
            found = clip_ids_in(shard.name, entries)
            ids += found
            known = {f"{clip_id}.safetensors" for clip_id in found}
            prefix = f"clips/{geometry.name}/{shard.name}"
            survey.strays += [f"{prefix}/{entry.name}" for entry in entries if entry.name not in known]
            if not is_folder(shard):
                survey.strays.append(prefix)


def _survey_links(store: LatentStore, folder: Path, survey: Survey) -> None:
    for entry in _list(store, folder, survey):
        if is_folder(entry):
            _survey_links(store, Path(entry.path), survey)


def _list(store: LatentStore, folder: Path, survey: Survey) -> list[os.DirEntry[str]]:
    """What a folder holds but for links, which are noted."""
    try:
        entries = list_folder(store.path, folder)
    except UnreadableFile as error:
        survey.unreadable.append(str(error))
        return []
    survey.links += [str(Path(entry.path).relative_to(store.path)) for entry in entries if entry.is_symlink()]
    return [entry for entry in entries if not entry.is_symlink()]
