"""Metadata in tables: a row costs a row, whatever it holds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exvideo_train.clips.bounds import parse_row, shown
from exvideo_train.clips.container import Reason, UnreadableClip
from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.sources.base import MALFORMED_ROW, Dropped, RawRows, Source, metadata_files, span_problem
from exvideo_train.clips.sources.video_index import VideoIndex

# What a row of another shape than expected gives rise to; anything else is a bug.
_ROW_ERRORS = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass
class Table(Source):
    """A data set whose metadata are text files with a row, in one of them, for one clip or more."""

    metadata: str

    def __post_init__(self) -> None:
        self._files = metadata_files(self.metadata)

    def total_progress(self) -> int:
        return sum(path.stat().st_size for path in self._files)

    def parse(self, piece: RawRows) -> Iterator[ClipRecord | Dropped]:
        yield from piece.dropped
        for number, row in piece.rows:
            where = f"{piece.where}:{number}"
            try:
                yield from self.clips(row, where)
            except UnreadableClip as problem:
                yield Dropped(problem.reason, problem.detail, where, self.video_of(row))
            except _ROW_ERRORS as error:
                detail = f"column {shown(error.args[0])} is missing" if isinstance(error, KeyError) else str(error)
                yield Dropped(MALFORMED_ROW, detail, where, self.video_of(row))

    @abstractmethod
    def clips(self, row: Any, where: str) -> list[ClipRecord | Dropped]:
        """What one row holds, all of it or nothing.

        Raises:
            UnreadableClip: its video cannot be used, with the reason. ValueError and the like: it is malformed.
        """

    def video_of(self, row: Any) -> str:
        """What names a row's video in the list of drops, as far as it can be told from a malformed row."""
        return ""


@dataclass
class SpanTable(Table):
    """A table of spans of YouTube videos, over a folder of videos named by YouTube id, or by id and span."""

    index: VideoIndex
    videos_are_cut: bool | None
    """True or False for files named by id alone; None leaves it to probing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.may_be_cut = self.videos_are_cut is None

    def pieces(self) -> Iterator[RawRows]:
        yield self.index.refused_folders()
        for path in self._files:
            yield from self.pieces_of(path)

    @abstractmethod
    def pieces_of(self, path: Path) -> Iterator[RawRows]:
        """The rows of one file."""

    def span(
        self, video_id: str, span: tuple[float, float], caption: str, scores: dict[str, float], where: str
    ) -> list[ClipRecord | Dropped]:
        """A clip, if its video is there.

        Raises:
            UnreadableClip: its video may not be read.
        """
        problem = span_problem(*span)
        if problem:
            return [Dropped(Reason.BAD_SPAN.value, problem, where, video_id, *span)]
        found = self.index.find_span(video_id, *span)
        if found is None:
            return [Dropped(Reason.MISSING.value, f"no video file is named {video_id}", where, video_id, *span)]
        path, named_by_span = found
        return self.clip(video_id, path, span, caption, scores, where, named_by_span or bool(self.videos_are_cut))


def parse_object(line: str | bytes) -> dict[str, Any]:
    """The JSON object of a line, or of a small file.

    Raises:
        ValueError: it is none, or beyond the bounds.
    """
    row = parse_row(line)
    if not isinstance(row, dict):
        raise ValueError(f"{shown(row)} is not a JSON object")
    return row


def text_field(row: dict[str, Any], name: str) -> str:
    """A field's text, empty for null.

    Raises:
        ValueError: it is something else. KeyError: there is no such field.
    """
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name}={shown(value)} is not text")
    return value
