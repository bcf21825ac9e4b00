"""Checking a latent store, measuring it and looking at it.

Only a file that was read and is wrong is damaged, and moves to ``damaged/``. What could not be read is left as it is
and keeps its line in the index: the next look may find it whole.
Axis letters: C channel, T latent frames, F video frames, H height, W width.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from exvideo_train.errors import UnreadableFile, UserError
from exvideo_train.files import atomic_write, atomic_write_bytes
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
from exvideo_train.models.stages import VideoEncoder

Index = Mapping[tuple[str, str], IndexEntry]
_OF_A_STORE = ("store.json", "index.jsonl", "empty_prompt.safetensors")
_STRAYS_SHOWN = 20
_FRAMES_SHOWN = 8
_CAPTION_LETTERS = 110


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


# -- measuring and looking ------------------------------------------------------------------------------------


def _spread(items: Sequence[str], count: int) -> list[str]:
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def describe_stats(store: LatentStore, num_clips: int) -> str:
    """Counts, sizes, and mean and standard deviation of each latent channel over some clips, scaled as in training."""
    lines = [f"store {store.path}, {store.normalisation.describe()}"]
    entries = store.read_index().values()
    for geometry in store.geometries():
        sizes = [entry.num_bytes for entry in entries if entry.geometry == geometry.name]
        if not sizes:
            lines.append(f"{geometry.name}: no finished clips")
            continue
        captions = len({entry.caption_sha256 for entry in entries if entry.geometry == geometry.name})
        lines.append(
            f"{geometry.name}: {len(sizes)} clips, {captions} captions, {sum(sizes) / 1e9:.3f} GB, "
            f"{len(sizes) * geometry.duration_seconds / 3600:.2f} h of video"
        )
        ids = _spread(store.clip_ids(geometry), num_clips)
        mean_C, deviation_C, noise_C = channel_stats(store, geometry, ids)
        lines += [f"  over {len(ids)} clips:", "  channel      mean       std  posterior std"]
        for channel, row in enumerate(zip(mean_C, deviation_C, noise_C, strict=True)):
            lines.append(f"  {channel:7d} {row[0]:9.4f} {row[1]:9.4f} {row[2]:14.5f}")
    return "\n".join(lines)


def channel_stats(store: LatentStore, geometry: Geometry, clip_ids: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, standard deviation, mean posterior deviation) of each channel of the scaled latents, float64 (C,)."""
    sum_C, square_C, noise_C = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    count = 0
    for clip_id in clip_ids:
        stored_CTHW = store.read(clip_id, geometry).tensors[store.family.latents_name].double()
        mean_CTHW = store.normalisation.mean(stored_CTHW).double()
        sum_C = sum_C + mean_CTHW.sum(dim=(1, 2, 3))
        square_C = square_C + mean_CTHW.square().sum(dim=(1, 2, 3))
        noise_C = noise_C + store.normalisation.deviation(stored_CTHW).double().sum(dim=(1, 2, 3))
        count += mean_CTHW[0].numel()
    mean_C = sum_C / count
    return mean_C, (square_C / count - mean_C.square()).clamp(min=0).sqrt(), noise_C / count


def write_previews(store: LatentStore, model_path: Path, device: str, num_clips: int, folder: Path) -> list[Path]:
    """Decode some clips of each geometry into a contact sheet; returns the pictures.

    Raises:
        UserError: the model is not the one that encoded the store.
    """
    from exvideo_train.latents.fingerprint import model_fingerprint

    pictures = []
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    for geometry in store.geometries():
        store.require(model_fingerprint(model_path, geometry))
    vae: VideoEncoder = store.family.video_encoder()(model_path, device, dtype, False)
    for geometry in store.geometries():
        rows = list(_preview_rows(store, geometry, vae, num_clips))
        path = folder / f"preview_{geometry.name}.png"
        atomic_write_bytes(path, _contact_sheet(rows))
        pictures.append(path)
    return pictures


def _preview_rows(
    store: LatentStore, geometry: Geometry, vae: VideoEncoder, num_clips: int
) -> Iterator[tuple[str, Tensor]]:
    """(label, frames) of each clip, _FRAMES_SHOWN evenly spread frames uint8 (F, H, W, C)."""
    for clip_id in _spread(store.clip_ids(geometry), num_clips):
        clip = store.read(clip_id, geometry)
        latents_CTHW = store.normalisation.mean(clip.tensors[store.family.latents_name])
        frames_FHWC, _ = vae.decode(latents_CTHW.transpose(0, 1))
        last = frames_FHWC.shape[0] - 1
        shown = [round(index * last / (_FRAMES_SHOWN - 1)) for index in range(_FRAMES_SHOWN)]
        yield f"{clip_id}  {clip.caption[:_CAPTION_LETTERS]}", frames_FHWC[shown]


def _contact_sheet(rows: list[tuple[str, Tensor]]) -> bytes:
    import io

    from PIL import Image, ImageDraw

    width, label_height = 240, 16
    height = round(width * rows[0][1].shape[1] / rows[0][1].shape[2])
    sheet = Image.new("RGB", (_FRAMES_SHOWN * width, len(rows) * (height + label_height)), "white")
    drawing = ImageDraw.Draw(sheet)
    for number, (label, frames_FHWC) in enumerate(rows):
        top = number * (height + label_height)
        # The built-in font knows no more than Latin letters.
        drawing.text((4, top + 2), label.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, frame_HWC in enumerate(frames_FHWC):
            picture = Image.fromarray(frame_HWC.numpy()).resize((width, height))
            sheet.paste(picture, (column * width, top + label_height))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()
