"""A plain folder: ``name.txt`` beside ``name.mp4``, or a CSV or JSON-lines file with a path and a caption column."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from exvideo_train.clips.bounds import MAX_CAPTION_LETTERS, shown
from exvideo_train.clips.container import Reason, UnreadableClip
from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.sources.base import (
    UNREADABLE_SIDECAR,
    Dropped,
    RawRows,
    as_score,
    parse_timestamp,
    span_problem,
    videos_folder,
)
from exvideo_train.clips.sources.folders import DataFolder, FolderSource
from exvideo_train.clips.sources.table import Table, parse_object, text_field
from exvideo_train.clips.sources.text_files import csv_pieces, json_line_pieces

# As many letters as are kept and one more, of four bytes each.
MAX_CAPTION_BYTES = 4 * (MAX_CAPTION_LETTERS + 1)
_SCORES = ("aesthetic", "umt", "matching")


@dataclass
class CaptionedFolder(FolderSource):
    """Every video of a tree, its caption in a text file of the same name; without one the caption is empty."""

    name: str = field(default="folder", init=False)

    def parse(self, piece: RawRows) -> Iterator[ClipRecord | Dropped]:
        yield from piece.dropped
        for _, name in piece.rows:
            video = os.path.join(piece.where, name)
            text, caption = f"{os.path.splitext(video)[0]}.txt", b""
            try:
                caption = self._folder.read(text, MAX_CAPTION_BYTES) or b""
            except UnreadableClip as problem:
                yield Dropped(UNREADABLE_SIDECAR, f"its caption is not read: {problem.detail}", text, video)
            yield from self.clip(video, video, (0.0, None), caption.decode("utf-8-sig", errors="replace"), {}, text)


@dataclass
class CaptionTable(Table):
    """Rows of a CSV (with a header) or JSON-lines file that name a video and its caption.

    Columns ``start_seconds`` and ``end_seconds`` (numbers or timestamps) give a span, and ``aesthetic``, ``umt`` and
    ``matching`` are scores, where they exist.
    """

    videos: str | None
    path_column: str
    caption_column: str
    follow_links: bool = False
    name: str = field(default="folder", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # A relative path is looked for below `videos`, or else beside the table itself; none may lead elsewhere.
        root = videos_folder(self.videos) if self.videos else self._files[0].absolute().parent
        self._folder = DataFolder(os.path.normpath(root), self.follow_links)

    def pieces(self) -> Iterator[RawRows]:
        for path in self._files:
            if path.suffix.lower() == ".csv":
                yield from csv_pieces(path, required=(self.path_column, self.caption_column))
            else:
                yield from json_line_pieces(path)

    def clips(self, line: str | dict[str, Any], where: str) -> list[ClipRecord | Dropped]:
        row = parse_object(line) if isinstance(line, str) else line
        name, caption = text_field(row, self.path_column), text_field(row, self.caption_column)
        if not name:
            raise ValueError(f"{self.path_column}={shown(name)} names no video")
        start_text, end_text = row.get("start_seconds"), row.get("end_seconds")
        start = 0.0 if start_text in (None, "") else parse_timestamp(start_text)
        end = None if end_text in (None, "") else parse_timestamp(end_text)
        video = os.path.normpath(os.path.join(self._folder.path, name))
        problem = span_problem(start, end)
        if problem:
            return [Dropped(Reason.BAD_SPAN.value, problem, where, video, start, end)]
        try:
            self._folder.check_video(video)
        except UnreadableClip as refused:
            return [Dropped(refused.reason, refused.detail, where, video, start, end)]
        scores = {key: score for key in _SCORES if (score := as_score(row.get(key))) is not None}
        return self.clip(video, video, (start, end), caption, scores, where)
