"""What video2dataset writes: ``00000/0000000_00000.mp4|.txt|.json`` in folders, or the same members in tar shards.

Shards are read in place: a clip's video is named ``shard.tar::member``.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from exvideo_train.clips.container import Reason
from exvideo_train.clips.record import TAR_SEPARATOR, ClipRecord
from exvideo_train.clips.sources.base import (
    UNREADABLE_SIDECAR,
    VIDEO_SUFFIXES,
    Dropped,
    RawRows,
    Source,
    as_score,
    videos_folder,
)
from exvideo_train.clips.sources.video_index import iter_files
from exvideo_train.errors import UserError

_SCORES = {
    "matching_score": "matching",
    "aesthetic_score": "aesthetic",
    "Aesthetic_Score": "aesthetic",
    "umt_score": "umt",
    "UMT_Score": "umt",
    "clip_similarity": "clip_similarity",
}
_CAPTION_KEYS = ("caption", "Caption", "text")
_ROWS_A_PIECE = 2000


@dataclass
class WebDataset(Source):
    """Clips of video2dataset output, found by walking a folder (or one shard)."""

    videos: str

    def __post_init__(self) -> None:
        self.name = "webdataset"
        self.progress_unit = "files"
        is_shard = os.path.isfile(self.videos) and self.videos.endswith(".tar")
        self._root = os.path.abspath(self.videos) if is_shard else str(videos_folder(self.videos))

    def total_progress(self) -> None:
        return None

    def pieces(self) -> Iterator[RawRows]:
        if self._root.endswith(".tar"):
            yield RawRows(self._root, [], 1)
            return
        found = False
        for folder, files in iter_files(self._root):
            for name in files:
                if name.endswith(".tar"):
                    found = True
                    yield RawRows(os.path.join(folder, name), [], 1)
            videos = [name for name in files if name.lower().endswith(VIDEO_SUFFIXES)]
            found = found or bool(videos)
            for start in range(0, len(videos), _ROWS_A_PIECE):
                part = videos[start : start + _ROWS_A_PIECE]
                yield RawRows(folder, list(enumerate(part)), len(part))
        if not found:
            raise UserError(
                f"videos={self.videos} holds neither .tar shards nor video files; give video2dataset's output"
            )

    def parse(self, piece: RawRows) -> Iterator[ClipRecord | Dropped]:
        if piece.where.endswith(".tar"):
            yield from self._parse_shard(piece.where)
            return
        for _, name in piece.rows:
            stem = os.path.splitext(os.path.join(piece.where, name))[0]
            video, json_path = os.path.join(piece.where, name), stem + ".json"
            yield from self._clip(video, _read(stem + ".txt"), _read(json_path), json_path)

    def _parse_shard(self, shard: str) -> Iterator[ClipRecord | Dropped]:
        """Pairs members by their name up to the first dot, as WebDataset does."""
        texts: dict[tuple[str, str], bytes] = {}
        videos: list[str] = []
        try:
            with tarfile.open(shard, "r|") as members:
                for member in members:
                    if not member.isreg():
                        continue
                    key, suffix = _split_member(member.name)
                    if suffix.lower() in VIDEO_SUFFIXES:
                        videos.append(member.name)
                    elif suffix in (".txt", ".json"):
                        stream = members.extractfile(member)
                        assert stream is not None
                        texts[key, suffix] = stream.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            yield Dropped(
                Reason.CORRUPT.value, f"{shard} is not a whole tar file ({error}); its end is not used", shard
            )
        for name in sorted(videos):
            key, _ = _split_member(name)
            video, json_path = (f"{shard}{TAR_SEPARATOR}{member}" for member in (name, f"{key}.json"))
            yield from self._clip(video, texts.get((key, ".txt")), texts.get((key, ".json")), json_path)

    def _clip(
        self, video: str, text: bytes | None, json_text: bytes | None, json_path: str
    ) -> Iterator[ClipRecord | Dropped]:
        metadata: dict[str, Any] = {}
        try:
            metadata = _as_object(json_text)
        except ValueError as error:
            detail = f"its scores are lost ({error}); download it again"
            yield Dropped(UNREADABLE_SIDECAR, detail, json_path, video)
        caption = text.decode("utf-8", errors="replace") if text is not None else ""
        for key in _CAPTION_KEYS:
            value = metadata.get(key)
            if isinstance(value, (list, tuple)) and len(value) == 1:
                value = value[0]
            if not caption.strip() and isinstance(value, str):
                caption = value
        scores = {name: score for key, name in _SCORES.items() if (score := as_score(metadata.get(key))) is not None}
        yield self.record(video, video, (0.0, None), caption.strip(), scores)


def _split_member(name: str) -> tuple[str, str]:
    folder, base = os.path.split(name)
    key, dot, suffix = base.partition(".")
    return os.path.join(folder, key), dot + suffix


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def _as_object(content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {}
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
