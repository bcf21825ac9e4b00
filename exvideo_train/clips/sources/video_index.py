"""Which video file holds a data set's video, for folders of millions of files.

A folder is listed once. Names are kept in flat arrays on disk that every worker maps, about 60 bytes a file, because
a Python dictionary of a million paths takes a quarter of a gigabyte, and a `stat` a row takes minutes on a network
file system.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from exvideo_train.clips.container import UnreadableClip
from exvideo_train.clips.sources.base import VIDEO_SUFFIXES, Dropped, RawRows
from exvideo_train.clips.sources.folders import DataFolder

# <id>_<start>_<end>, as cutting scripts name what they cut: timestamps with : - _ or . between their parts, or seconds.
_CLOCK = r"\d{1,2}[:\-_.]\d{2}[:\-_.]\d{2}[.,_]\d{1,6}"
_SECONDS = r"\d+\.\d+"
_SPAN_NAME = re.compile(rf"(?P<id>.+?)[_\-.](?P<start>{_CLOCK}|{_SECONDS})[_\-](?P<end>{_CLOCK}|{_SECONDS})")


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def span_key(video_id: str, start_seconds: float, end_seconds: float) -> str:
    """Key of a file that holds one span: id and whole milliseconds."""
    return f"{video_id}\0{round(start_seconds * 1000)}\0{round(end_seconds * 1000)}"


def _key_of_stem(stem: str) -> str:
    match = _SPAN_NAME.fullmatch(stem)
    if not match:
        return stem
    return span_key(match["id"], _name_seconds(match["start"]), _name_seconds(match["end"]))


def _name_seconds(text: str) -> float:
    parts = re.split(r"[:\-_.,]", text)
    if len(parts) == 2:
        return float(text)
    hours, minutes, seconds, fraction = parts
    return int(hours) * 3600 + int(minutes) * 60 + float(f"{seconds}.{fraction}")


@dataclass
class VideoIndex:
    """Video files of a folder by stem, or by id and span for names that carry a span."""

    folder: str
    arrays: Path
    num_files: int
    has_span_names: bool
    refused: dict[str, UnreadableClip]
    """What may not be read, by path."""
    dropped: list[Dropped]
    """Folders that were not searched."""
    _loaded: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _last: tuple[str, str | None] = ("", None)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_loaded": {}}

    def refused_folders(self) -> RawRows:
        """What was not searched, for the list of drops."""
        return RawRows(self.folder, [], 0, self.dropped)

    def find(self, key: str) -> str | None:
        """Path of the file with this key, None when there is none; of several the first in order of path.

        Raises:
            UnreadableClip: that file may not be read.
        """
        if not self._loaded:
            self._load()
        arrays = self._loaded
        wanted = np.uint64(_hash(key))
        position = int(np.searchsorted(arrays["hashes"], wanted))
        if position == self.num_files or arrays["hashes"][position] != wanted:
            return None
        number = int(arrays["order"][position])
        begin, end = arrays["offsets"][number : number + 2]
        name = bytes(arrays["names"][begin:end])
        path = os.fsdecode(os.path.join(self._folders[int(arrays["folders"][number])], name))
        if self.refused and path in self.refused:
            raise self.refused[path]
        return path

    def find_span(self, video_id: str, start_seconds: float, end_seconds: float) -> tuple[str, bool] | None:
        """(path, whether the file holds this span alone) of a video."""
        if self.has_span_names:
            path = self.find(span_key(video_id, start_seconds, end_seconds))
            if path is not None:
                return path, True
        # The clips of one video come one after another.
        if video_id != self._last[0]:
            self._last = video_id, self.find(video_id)
        path = self._last[1]
        return None if path is None else (path, False)

    def _load(self) -> None:
        for name in ("hashes", "order", "offsets", "folders"):
            # A plain view: numpy's memmap class costs several microseconds more a lookup.
            self._loaded[name] = np.load(self.arrays / f"{name}.npy", mmap_mode="r").view(np.ndarray)
        self._loaded["names"] = np.memmap(self.arrays / "names.bin", dtype=np.uint8, mode="r").view(np.ndarray)
        self._folders = (self.arrays / "folders.txt").read_bytes().split(b"\0")


def build_video_index(folder: Path, arrays: Path, follow_links: bool = False) -> VideoIndex:
    """List `folder` and write the index's arrays into the folder `arrays`."""
    arrays.mkdir(parents=True, exist_ok=True)
    hashes, folder_numbers, offsets = _Column("u8"), _Column("i4"), _Column("i8")
    folders: list[bytes] = []
    refused: dict[str, UnreadableClip] = {}
    dropped: list[Dropped] = []
    has_span_names = False
    position = 0
    with open(arrays / "names.bin", "wb") as names:
        for listing in DataFolder(str(folder), follow_links).walk():
            folders.append(os.fsencode(listing.folder))
            for name, problem, is_folder in listing.refused:
                path = os.path.join(listing.folder, name)
                refused[path] = problem
                if is_folder:
                    dropped.append(Dropped(problem.reason, problem.detail, path, path))
            # A refused file keeps its place, so that its clips are said to be refused, not missing.
            for name in sorted([*listing.files, *(entry.name for entry in listing.refused)]):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() not in VIDEO_SUFFIXES:
                    continue
                key = _key_of_stem(stem)
                has_span_names = has_span_names or key is not stem
                hashes.append(_hash(key))
                folder_numbers.append(len(folders) - 1)
                offsets.append(position)
                position += names.write(os.fsencode(name))
        if position == 0:
            names.write(b"\0")  # an empty file cannot be mapped
    offsets.append(position)
    unsorted = hashes.array()
    order = np.argsort(unsorted, kind="stable")
    np.save(arrays / "hashes.npy", unsorted[order])
    np.save(arrays / "order.npy", order)
    np.save(arrays / "offsets.npy", offsets.array())
    np.save(arrays / "folders.npy", folder_numbers.array())
    (arrays / "folders.txt").write_bytes(b"\0".join(folders))
    return VideoIndex(str(folder), arrays, len(unsorted), has_span_names, refused, dropped)


class _Column:
    """A growing array of numbers that never becomes a list of Python objects."""

    def __init__(self, dtype: str) -> None:
        self._full: list[np.ndarray] = []
        self._part = np.empty(1 << 16, dtype)
        self._used = 0

    def append(self, value: int) -> None:
        if self._used == len(self._part):
            self._full.append(self._part)
            self._part = np.empty_like(self._part)
            self._used = 0
        self._part[self._used] = value
        self._used += 1

    def array(self) -> np.ndarray:
        return np.concatenate([*self._full, self._part[: self._used]])
