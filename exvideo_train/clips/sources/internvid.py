"""InternVid: JSON lines, one clip a line; videos downloaded by the user, whole or cut already.

Format as published (10M-FLT and others): ``YoutubeID``, ``Start_timestamp`` and ``End_timestamp`` ("00:03:10.567"),
``Caption``, ``Aesthetic_Score``, ``UMT_Score``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.sources.base import Dropped, RawRows, as_score, parse_timestamp
from exvideo_train.clips.sources.table import SpanTable, parse_object, text_field
from exvideo_train.clips.sources.text_files import json_line_pieces

_SCORES = {"Aesthetic_Score": "aesthetic", "UMT_Score": "umt"}


@dataclass
class InternVid(SpanTable):
    """Clips of InternVid metadata."""

    name: str = field(default="internvid", init=False)

    def pieces_of(self, path: Path) -> Iterator[RawRows]:
        return json_line_pieces(path)

    def clips(self, line: str, where: str) -> list[ClipRecord | Dropped]:
        row = parse_object(line)
        video_id = text_field(row, "YoutubeID")
        span = parse_timestamp(row["Start_timestamp"]), parse_timestamp(row["End_timestamp"])
        caption = text_field(row, "Caption") if "Caption" in row else ""
        scores = {name: score for key, name in _SCORES.items() if (score := as_score(row.get(key))) is not None}
        return self.span(video_id, span, caption, scores, where)
