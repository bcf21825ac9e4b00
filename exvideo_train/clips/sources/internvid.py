"""InternVid: JSON lines, one clip a line; videos downloaded by the user, whole or cut already.

Format as published (10M-FLT and others): ``YoutubeID``, ``Start_timestamp`` and ``End_timestamp`` ("00:03:10.567"),
``Caption``, ``Aesthetic_Score``, ``UMT_Score``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from exvideo_train.clips.container import Reason
from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.sources.base import Dropped, RawRows, as_score, parse_timestamp, span_problem
from exvideo_train.clips.sources.table import Table, parse_object, text_field
from exvideo_train.clips.sources.text_files import json_line_pieces
from exvideo_train.clips.sources.video_index import VideoIndex

_SCORES = {"Aesthetic_Score": "aesthetic", "UMT_Score": "umt"}


@dataclass
class InternVid(Table):
    """Clips of InternVid metadata over a folder of videos named by YouTube id, or by id and span."""

    index: VideoIndex
    videos_are_cut: bool | None
    """True or False for files named by id alone; None leaves it to probing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = "internvid"
        self.may_be_cut = self.videos_are_cut is None

    def pieces(self) -> Iterator[RawRows]:
        yield self.index.refused_folders()
        for path in self._files:
            yield from json_line_pieces(path)

    def clips(self, line: str, where: str) -> list[ClipRecord | Dropped]:
        row = parse_object(line)
        video_id = text_field(row, "YoutubeID")
        span = parse_timestamp(row["Start_timestamp"]), parse_timestamp(row["End_timestamp"])
        caption = text_field(row, "Caption") if "Caption" in row else ""
        problem = span_problem(*span)
        if problem:
            return [Dropped(Reason.BAD_SPAN.value, problem, where, video_id, *span)]
        found = self.index.find_span(video_id, *span)
        if found is None:
            return [Dropped(Reason.MISSING.value, f"no video file is named {video_id}", where, video_id, *span)]
        path, named_by_span = found
        scores = {name: score for key, name in _SCORES.items() if (score := as_score(row.get(key))) is not None}
        return self.clip(video_id, path, span, caption, scores, where, named_by_span or bool(self.videos_are_cut))
