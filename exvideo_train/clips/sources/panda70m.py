"""Panda-70M: CSV, one row a source video, its clips in columns that hold Python lists as text.

Format as published: ``videoID``, ``url``, ``timestamp`` ("[['0:00:08.123', '0:00:12.456'], ...]"), ``caption``,
``matching_score``; newer files add ``desirable_filtering`` and ``shot_boundary_detection``, one entry a clip.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from exvideo_train.clips.container import Reason
from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.sources.base import (
    MALFORMED_ROW,
    Dropped,
    RawRows,
    Source,
    as_score,
    metadata_files,
    parse_timestamp,
    span_problem,
)
from exvideo_train.clips.sources.text_files import csv_pieces
from exvideo_train.clips.sources.video_index import VideoIndex

_STAMP = r"""['"](\d+:\d{2}:\d{2}(?:\.\d+)?)['"]"""
_PAIR = re.compile(rf"\[\s*{_STAMP}\s*,\s*{_STAMP}\s*\]")
_PAIRS = re.compile(rf"\[\s*{_PAIR.pattern}(?:\s*,\s*{_PAIR.pattern})*\s*\]")
# One Python string literal without escapes; a list of only such is read without the (4x slower) Python parser.
_STRING = r"""(?:'([^'\\]*)'|"([^"\\]*)")"""
_STRINGS = re.compile(rf"\[\s*{_STRING}(?:\s*,\s*{_STRING})*\s*\]")
_ONE_STRING = re.compile(_STRING)


@dataclass
class Panda70M(Source):
    """Clips of Panda-70M metadata over a folder of videos named by YouTube id, or by id and span."""

    metadata: str
    index: VideoIndex
    videos_are_cut: bool | None
    """True or False for files named by id alone; None leaves it to probing."""

    def __post_init__(self) -> None:
        self.name = "panda70m"
        self.may_be_cut = self.videos_are_cut is None
        self._files = metadata_files(self.metadata)

    def total_progress(self) -> int:
        return sum(path.stat().st_size for path in self._files)

    def pieces(self) -> Iterator[RawRows]:
        for path in self._files:
            yield from csv_pieces(path, required=("videoID", "timestamp", "caption"))

    def parse(self, piece: RawRows) -> Iterator[ClipRecord | Dropped]:
        for number, row in piece.rows:
            where = f"{piece.where}:{number}"
            try:
                spans = parse_spans(row["timestamp"] or "")
                captions = parse_list(row["caption"] or "")
                if len(captions) != len(spans):
                    raise ValueError(f"{len(spans)} timestamps but {len(captions)} captions")
                columns = [(name, _optional_list(row, column, len(spans))) for column, name in _COLUMNS]
            except (TypeError, ValueError, SyntaxError) as error:
                yield Dropped(MALFORMED_ROW, str(error), where, row.get("videoID") or "")
                continue
            video_id = row["videoID"]
            for clip, span in enumerate(spans):
                scores = {
                    name: score
                    for name, values in columns
                    if values is not None and (score := _SCORE_READERS[name](values[clip])) is not None
                }
                yield self._clip(video_id, span, str(captions[clip] or "").strip(), scores, where)

    def _clip(
        self, video_id: str, span: tuple[float, float], caption: str, scores: dict[str, float], where: str
    ) -> ClipRecord | Dropped:
        problem = span_problem(*span)
        if problem:
            return Dropped(Reason.BAD_SPAN.value, problem, where, video_id, *span)
        found = self.index.find_span(video_id, *span)
        if found is None:
            return Dropped(Reason.MISSING.value, f"no video file is named {video_id}", where, video_id, *span)
        path, named_by_span = found
        return self.record(video_id, path, span, caption, scores, named_by_span or bool(self.videos_are_cut))


def _desirable(value: object) -> float | None:
    """1 for clips that Panda-70M's own filter calls desirable, 0 for those it does not."""
    return float(value == "desirable") if isinstance(value, str) and value else None


def _num_shots(value: object) -> float | None:
    return float(len(value)) if isinstance(value, (list, tuple)) and value else None


_COLUMNS = (("matching_score", "matching"), ("desirable_filtering", "desirable"), ("shot_boundary_detection", "shots"))
_SCORE_READERS = {"matching": as_score, "desirable": _desirable, "shots": _num_shots}


def parse_spans(text: str) -> list[tuple[float, float]]:
    """Spans in seconds of a ``timestamp`` field.

    Raises:
        ValueError: not a list of pairs of timestamps.
    """
    if _PAIRS.fullmatch(text.strip()):
        return [(parse_timestamp(first), parse_timestamp(second)) for first, second in _PAIR.findall(text)]
    spans = []
    for pair in parse_list(text):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"timestamp {pair!r} is not a pair")
        spans.append((parse_timestamp(pair[0]), parse_timestamp(pair[1])))
    return spans


def parse_list(text: str) -> list[Any]:
    """The Python (or JSON) list that a field holds as text.

    Raises:
        ValueError: not a list.
    """
    if _STRINGS.fullmatch(text.strip()):
        return [single or double for single, double in _ONE_STRING.findall(text)]
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{text[:60]!r} is not a list") from None
    if not isinstance(value, list):
        raise ValueError(f"{text[:60]!r} is not a list")
    return value


def _optional_list(row: dict[str, str], column: str, length: int) -> list[Any] | None:
    text = row.get(column)
    if not text:
        return None
    values = parse_list(text)
    if len(values) != length:
        raise ValueError(f"{length} timestamps but {len(values)} entries in {column}")
    return values
