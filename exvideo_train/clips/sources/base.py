"""What every data set gives: candidates for clips, or rows that are none, with the reason."""

from __future__ import annotations

import glob
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exvideo_train.clips.bounds import (
    MAX_CAPTION_LETTERS,
    MAX_SCORE,
    MAX_SECONDS,
    clean_caption,
    is_clean_caption,
    shown,
)
from exvideo_train.clips.record import ClipRecord, make_clip_id
from exvideo_train.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".ts", ".flv", ".mpg", ".mpeg", ".3gp")

MALFORMED_ROW = "malformed_row"
BAD_NAME = "bad_name"
UNREADABLE_SIDECAR = "unreadable_sidecar"
DAMAGED_CAPTION = "damaged_caption"
CUT_CAPTION = "cut_caption"
# Listed and counted as drops are, while the clip itself enters the manifest.
KEPT_REASONS = frozenset({UNREADABLE_SIDECAR, DAMAGED_CAPTION, CUT_CAPTION})

_MAX_NUMBER_LETTERS = 40
# What other files than UTF-8 text begin with.
_OTHER_KINDS = {
    b"\xff\xfe": "UTF-16 text; write it as UTF-8",
    b"\xfe\xff": "UTF-16 text; write it as UTF-8",
    b"\x1f\x8b": "gzip; unpack it",
    b"BZh": "bzip2; unpack it",
    b"\xfd7zXZ": "xz; unpack it",
    b"\x28\xb5\x2f\xfd": "Zstandard; unpack it",
    b"PK\x03\x04": "a zip file; unpack it",
    b"PAR1": "Parquet; write it as CSV or JSON lines",
}
_TIMESTAMP = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:[.,]\d+)?)")


@dataclass(frozen=True)
class Dropped:
    """What does not enter the manifest: a row or clip, or for `KEPT_REASONS` something that a clip came with.

    `reason` is a stable word, `where` names file and line.
    """

    reason: str
    detail: str
    where: str = ""
    video: str = ""
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True)
class RawRows:
    """A piece of a data set that one worker parses at a time, and how much of the whole it is.

    Args:
        where: the file it comes from.
        rows: (line number, content) pairs, content as the source's `parse` expects it.
        progress: units of `Source.total_progress` that this piece covers.
        dropped: what was found not to be a row already.
    """

    where: str
    rows: list[tuple[int, Any]]
    progress: int
    dropped: list[Dropped] = field(default_factory=list)


@dataclass
class Source(ABC):
    """A kind of data set. `pieces` runs in the parent and is cheap; `parse` runs in workers, so sources pickle."""

    name: str = field(default="", init=False)

    @abstractmethod
    def pieces(self) -> Iterator[RawRows]:
        """The data set in pieces of bounded size, in a fixed order."""

    @abstractmethod
    def parse(self, piece: RawRows) -> Iterator[ClipRecord | Dropped]:
        """Clips of one piece."""

    @abstractmethod
    def total_progress(self) -> int | None:
        """Sum of all pieces' `progress`, None when it is unknown."""

    progress_unit: str = field(default="B", init=False)
    """What `progress` counts: bytes (B) or files."""

    may_be_cut: bool = field(default=False, init=False)
    """Whether a video may turn out, on probing, to be the span alone rather than the whole source video."""

    def clip(
        self,
        video_key: str,
        video: str,
        span: tuple[float, float | None],
        caption: str,
        scores: dict[str, float],
        where: str,
        cut: bool = False,
    ) -> list[ClipRecord | Dropped]:
        """A clip whose id comes of the data set's own span, and what was done to its caption.

        A video that is cut already is used from end to end.
        """
        caption = caption.strip()
        notes = []
        if not is_clean_caption(caption):
            caption, num_damaged, num_cut = clean_caption(caption)
            if num_damaged:
                detail = (
                    f"{num_damaged} letters of its caption are no text: half characters, control characters, no UTF-8"
                )
                notes.append(Dropped(DAMAGED_CAPTION, detail, where, video, *span))
            if num_cut:
                detail = f"its caption has more than {MAX_CAPTION_LETTERS:,} letters; the others are left out"
                notes.append(Dropped(CUT_CAPTION, detail, where, video, *span))
        start, end = (0.0, None) if cut else span
        record = ClipRecord(make_clip_id(self.name, video_key, *span), self.name, video, start, end, caption, scores)
        return [*notes, record] if notes else [record]


def parse_timestamp(text: object) -> float:
    """Seconds of ``H:MM:SS.mmm``, ``MM:SS`` or a plain number.

    Raises:
        ValueError: none of these.
    """
    if isinstance(text, str):
        match = _TIMESTAMP.fullmatch(text.strip()) if len(text) <= _MAX_NUMBER_LETTERS else None
        if match:
            hours, minutes, seconds = match.groups()
            return round(int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", ".")), 6)
    if isinstance(text, (str, int, float)) and not isinstance(text, bool):
        try:
            return float(text)
        except (ValueError, OverflowError):
            pass
    raise ValueError(f"timestamp {shown(text)} is not H:MM:SS.mmm")


def span_problem(start: float, end: float | None) -> str | None:
    """What is wrong with a span, None when nothing is."""
    if 0 <= start <= MAX_SECONDS and (end is None or start < end <= MAX_SECONDS):
        return None
    if not math.isfinite(start) or (end is not None and not math.isfinite(end)):
        return f"span {start}..{end} is not finite"
    if start < 0:
        return f"start {start:g} s is negative"
    if end is not None and end <= start:
        return f"end {end:g} s is not after start {start:g} s"
    return f"span {start:g}..{end} lies beyond {MAX_SECONDS:g} s"


def as_score(value: object) -> float | None:
    """A number of at most `MAX_SCORE`, or None for what is not one; lists of one number count, text too."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= MAX_SCORE else None


def metadata_files(metadata: str) -> list[Path]:
    """The files that a `metadata` option names: one path, or a glob pattern.

    Raises:
        UserError: none exists, or one is empty or no text.
    """
    path = Path(metadata)
    paths = [path] if path.exists() else sorted(Path(name) for name in glob.glob(metadata))
    if not paths:
        raise UserError(f"metadata={metadata} does not exist; give the data set's metadata file")
    for entry in paths:
        if not entry.is_file():
            raise UserError(f"metadata={entry} is not a file; give the data set's metadata file or a glob pattern")
        if entry.stat().st_size == 0:
            raise UserError(f"metadata={entry} is empty; download it again")
        with open(entry, "rb") as stream:
            head = stream.read(8)
        for begin, kind in _OTHER_KINDS.items():
            if head.startswith(begin):
                raise UserError(f"metadata={entry} is {kind}")
    return paths


def videos_folder(videos: str) -> Path:
    """The folder that a `videos` option names, absolute.

    Raises:
        UserError: it is not a folder.
    """
    path = Path(videos)
    if not path.is_dir():
        raise UserError(f"videos={videos} is not a folder; give the folder of the downloaded videos")
    return path.absolute()
