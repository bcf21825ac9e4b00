"""Panda-70M: CSV, one row a source video, its clips in columns that hold Python lists as text.

Format as published: ``videoID``, ``url``, ``timestamp`` ("[['0:00:08.123', '0:00:12.456'], ...]"), ``caption``,
``matching_score``; newer files add ``desirable_filtering`` and ``shot_boundary_detection``, one entry a clip.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exvideo_train.clips.bounds import parse_row, shown
from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.sources.base import Dropped, RawRows, as_score, parse_timestamp
from exvideo_train.clips.sources.table import SpanTable
from exvideo_train.clips.sources.text_files import csv_pieces

_STAMP = r"""['"](\d+:\d{2}:\d{2}(?:\.\d+)?)['"]"""
_PAIR = re.compile(rf"\[\s*{_STAMP}\s*,\s*{_STAMP}\s*\]")
_PAIRS = re.compile(rf"\[\s*{_PAIR.pattern}(?:\s*,\s*{_PAIR.pattern})*\s*\]")
# One Python string literal without escapes; a list of only such is read without the (4x slower) Python parser.
_STRING = r"""(?:'([^'\\]*)'|"([^"\\]*)")"""
_STRINGS = re.compile(rf"\[\s*{_STRING}(?:\s*,\s*{_STRING})*\s*\]")
_ONE_STRING = re.compile(_STRING)
# A day of clips of five seconds has 17,000 captions; Python's parser takes half a kilobyte an entry.
_MAX_COMMAS = 100_000


@dataclass
class Panda70M(SpanTable):
    """Clips of Panda-70M metadata."""

    name: str = field(default="panda70m", init=False)

    def pieces_of(self, path: Path) -> Iterator[RawRows]:
        return csv_pieces(path, required=("videoID", "timestamp", "caption"))

    def clips(self, row: dict[str, str], where: str) -> list[ClipRecord | Dropped]:
        video_id = row["videoID"]
        spans = parse_spans(row["timestamp"])
        captions = parse_list(row["caption"])
        if not spans:
            raise ValueError("it lists no clip")
        if len(captions) != len(spans):
            raise ValueError(f"{len(spans)} timestamps but {len(captions)} captions")
        columns = [(name, _optional_list(row, column, len(spans))) for column, name in _COLUMNS]
        entries: list[ClipRecord | Dropped] = []
        for clip, span in enumerate(spans):
            scores = {
                name: score
                for name, values in columns
                if values is not None and (score := _SCORE_READERS[name](values[clip])) is not None
            }
            caption = captions[clip] or ""
            if not isinstance(caption, str):
                raise ValueError(f"caption {shown(caption)} is not text")
            entries += self.span(video_id, span, caption, scores, where)
        return entries

    def video_of(self, row: dict[str, str]) -> str:
        return row.get("videoID", "")


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
            raise ValueError(f"timestamp {shown(pair)} is not a pair")
        spans.append((parse_timestamp(pair[0]), parse_timestamp(pair[1])))
    return spans


def parse_list(text: str) -> list[Any]:
    """The Python (or JSON) list that a field holds as text.

    Raises:
        ValueError: not a list, or one beyond the bounds.
    """
    if text.count(",") > _MAX_COMMAS:
        raise ValueError(f"{text[:60]!r} goes on for more than {_MAX_COMMAS:,} commas")
    if _STRINGS.fullmatch(text.strip()):
        return [single or double for single, double in _ONE_STRING.findall(text)]
    try:
        value = parse_row(text)
    except ValueError:
        try:
            # The parser warns of what a stranger's text would mean as a program ("\\d", "1if").
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
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
