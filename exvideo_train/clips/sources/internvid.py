"""InternVid: JSON lines, one clip a line; videos downloaded by the user, whole or cut already.

Format as published (10M-FLT and others): ``YoutubeID``, ``Start_timestamp`` and ``End_timestamp`` ("00:03:10.567"),
``Caption``, ``Aesthetic_Score``, ``UMT_Score``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

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
from exvideo_train.clips.sources.text_files import json_line_pieces
from exvideo_train.clips.sources.video_index import VideoIndex

_SCORES = {"Aesthetic_Score": "aesthetic", "UMT_Score": "umt"}


@dataclass
class InternVid(Source):
    """Clips of InternVid metadata over a folder of videos named by YouTube id, or by id and span."""

    metadata: str
    index: VideoIndex
    videos_are_cut: bool | None
    """True or False for files named by id alone; None leaves it to probing."""

    def __post_init__(self) -> None:
        self.name = "internvid"
        self.may_be_cut = self.videos_are_cut is None
        self._files = metadata_files(self.metadata)

    def total_progress(self) -> int:
        return sum(path.stat().st_size for path in self._files)

    def pieces(self) -> Iterator[RawRows]:
        for path in self._files:
            yield from json_line_pieces(path)

    def parse(self, piece: RawRows) -> Iterator[ClipRecord | Dropped]:
        for number, line in piece.rows:
            where = f"{piece.where}:{number}"
            try:
                row = json.loads(line)
                video_id = str(row["YoutubeID"])
                span = parse_timestamp(row["Start_timestamp"]), parse_timestamp(row["End_timestamp"])
                caption = row.get("Caption") or ""
                if not isinstance(caption, str):
                    raise ValueError(f"Caption={caption!r} is not text")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                detail = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
                yield Dropped(MALFORMED_ROW, detail, where)
                continue
            problem = span_problem(*span)
            if problem:
                yield Dropped(Reason.BAD_SPAN.value, problem, where, video_id, *span)
                continue
            found = self.index.find_span(video_id, *span)
            if found is None:
                yield Dropped(Reason.MISSING.value, f"no video file is named {video_id}", where, video_id, *span)
                continue
            path, named_by_span = found
            scores = {name: score for key, name in _SCORES.items() if (score := as_score(row.get(key))) is not None}
            cut = named_by_span or bool(self.videos_are_cut)
            yield self.record(video_id, path, span, caption.strip(), scores, cut)
