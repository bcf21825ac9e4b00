"""A plain folder: ``name.txt`` beside ``name.mp4``, or a CSV or JSON-lines file with a path and a caption column."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exvideo_train.clips.container import Reason
from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.sources.base import (
    MALFORMED_ROW,
    VIDEO_SUFFIXES,
    Dropped,
    RawRows,
    Source,
    as_score,
    metadata_files,
    parse_timestamp,
    span_problem,
    videos_folder,
)
from exvideo_train.clips.sources.text_files import csv_pieces, json_line_pieces
from exvideo_train.clips.sources.video_index import iter_files
from exvideo_train.errors import UserError

_ROWS_A_PIECE = 2000
_SCORES = ("aesthetic", "umt", "matching")


@dataclass
class CaptionedFolder(Source):
    """Every video of a tree, its caption in a text file of the same name; without one the caption is empty."""

    videos: str

    def __post_init__(self) -> None:
        self.name = "folder"
        self.progress_unit = "files"
        self._root = videos_folder(self.videos)

    def total_progress(self) -> None:
        return None

    def pieces(self) -> Iterator[RawRows]:
        found = False
        for folder, files in iter_files(str(self._root)):
            videos = [name for name in files if name.lower().endswith(VIDEO_SUFFIXES)]
            found = found or bool(videos)
            for start in range(0, len(videos), _ROWS_A_PIECE):
                part = videos[start : start + _ROWS_A_PIECE]
                yield RawRows(folder, list(enumerate(part)), len(part))
        if not found:
            raise UserError(f"videos={self.videos} holds no video file ({', '.join(VIDEO_SUFFIXES)})")

    def parse(self, piece: RawRows) -> Iterator[ClipRecord | Dropped]:
        for _, name in piece.rows:
            video = os.path.join(piece.where, name)
            text = Path(video).with_suffix(".txt")
            caption = text.read_bytes().decode("utf-8", errors="replace") if text.is_file() else ""
            yield self.record(video, video, (0.0, None), caption.strip(), {})


@dataclass
class CaptionTable(Source):
    """Rows of a CSV (with a header) or JSON-lines file that name a video and its caption.

    Columns ``start_seconds`` and ``end_seconds`` (numbers or timestamps) give a span, and ``aesthetic``, ``umt`` and
    ``matching`` are scores, where they exist.
    """

    metadata: str
    videos: str | None
    path_column: str
    caption_column: str

    def __post_init__(self) -> None:
        self.name = "folder"
        self._files = metadata_files(self.metadata)
        # A relative path is looked for below `videos`, or else beside the table itself.
        self._root = videos_folder(self.videos) if self.videos else self._files[0].absolute().parent

    def total_progress(self) -> int:
        return sum(path.stat().st_size for path in self._files)

    def pieces(self) -> Iterator[RawRows]:
        for path in self._files:
            if path.suffix.lower() == ".csv":
                yield from csv_pieces(path, required=(self.path_column, self.caption_column))
            else:
                yield from json_line_pieces(path)

    def parse(self, piece: RawRows) -> Iterator[ClipRecord | Dropped]:
        for number, row in piece.rows:
            where = f"{piece.where}:{number}"
            try:
                yield self._clip(json.loads(row) if isinstance(row, str) else row, where)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                detail = f"column {error} is missing" if isinstance(error, KeyError) else str(error)
                yield Dropped(MALFORMED_ROW, detail, where)

    def _clip(self, row: dict[str, Any], where: str) -> ClipRecord | Dropped:
        name, caption = row[self.path_column], row[self.caption_column] or ""
        if not isinstance(name, str) or not name or not isinstance(caption, str):
            raise ValueError(f"{self.path_column}={name!r}, {self.caption_column}={caption!r} must be text")
        start_text, end_text = row.get("start_seconds"), row.get("end_seconds")
        start = 0.0 if start_text in (None, "") else parse_timestamp(start_text)
        end = None if end_text in (None, "") else parse_timestamp(end_text)
        video = os.path.normpath(os.path.join(self._root, name))
        problem = span_problem(start, end)
        if problem:
            return Dropped(Reason.BAD_SPAN.value, problem, where, video, start, end)
        if not os.path.exists(video):
            return Dropped(Reason.MISSING.value, f"{video} does not exist", where, video, start, end)
        scores = {key: score for key in _SCORES if (score := as_score(row.get(key))) is not None}
        return self.record(video, video, (start, end), caption.strip(), scores)
