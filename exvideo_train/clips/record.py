"""One clip of a data set, and the JSON-lines manifest that lists them.

A manifest is a text file with one JSON object a line. It is read and written one line at a time, so that its
length is never a matter of memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from exvideo_train.clips.bounds import (
    MAX_LINE_BYTES,
    MAX_SCORE,
    MAX_SECONDS,
    bounded_number,
    clean_caption,
    parse_row,
    shown,
)
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write

# Separates a tar shard from its member in `ClipRecord.video`, as in "/data/00000.tar::0000000_00000.mp4".
TAR_SEPARATOR = "::"
_ID_DIGITS = 32
# json.dumps builds an encoder a call unless all its arguments are defaults: 3 microseconds a record.
_encode = json.JSONEncoder(ensure_ascii=False).encode
_encode_ascii = json.JSONEncoder().encode
# It becomes a file name, with a suffix.
_MAX_ID_LETTERS = 128
# Least and greatest value. A span that begins before its video is refused where it is used, with its clip alone.
_LIMITS = {
    "start_seconds": (-MAX_SECONDS, MAX_SECONDS),
    "end_seconds": (-MAX_SECONDS, MAX_SECONDS),
    "fps": (0.0, 1e6),
    "width": (0, 1 << 20),
    "height": (0, 1 << 20),
    "duration_seconds": (-MAX_SECONDS, MAX_SECONDS),
    "sampling_fps": (1e-3, 1e6),
}


@dataclass(frozen=True)
class ClipRecord:
    """A span of a video with its caption.

    Args:
        clip_id: stable hex digest of source, video and span; see `make_clip_id`.
        source: the kind of data set it came from, e.g. ``internvid``.
        video: path of the video file, or ``shard.tar::member`` for a video inside a tar shard.
        start_seconds: beginning of the span, counted from the video's first frame.
        end_seconds: end of the span, None for the end of the video.
        caption: text, may be empty (filtering can drop such clips).
        scores: what the data set says about the clip, e.g. ``{"aesthetic": 5.1}``.
        fps, width, height, duration_seconds, codec: what probing found, None until probed. Width and height are as
            shown, rotation included; duration_seconds is the span's, not the file's.
        sampling_fps: frames a second at which this clip is sampled in place of the experiment's rate; set by filtering
            for clips that are too short otherwise, None for all others.
    """

    clip_id: str
    source: str
    video: str
    start_seconds: float
    end_seconds: float | None
    caption: str
    scores: dict[str, float] = field(default_factory=dict)
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    duration_seconds: float | None = None
    codec: str | None = None
    sampling_fps: float | None = None

    @property
    def span_seconds(self) -> float | None:
        """Length of the span as far as it is known: from its ends, or else from probing."""
        if self.end_seconds is not None:
            return self.end_seconds - self.start_seconds
        return self.duration_seconds

    def to_json(self) -> str:
        """One manifest line without its newline; equal records give equal text."""
        content = {name: value for name in _FIELD_NAMES if (value := getattr(self, name)) is not None}
        content["scores"] = dict(sorted(self.scores.items()))
        text = _encode(content)
        if text.isascii():
            return text
        try:
            text.encode()
        except UnicodeEncodeError:
            # A file name that is not UTF-8: escaped, it comes back as the same name.
            return _encode_ascii(content)
        return text


_FIELD_NAMES = tuple(entry.name for entry in fields(ClipRecord))


def make_clip_id(source: str, video_key: str, start_seconds: float, end_seconds: float | None) -> str:
    """Stable id of a clip: 32 hex digits from source, video and span.

    Args:
        source: kind of data set.
        video_key: what names the video within that kind wherever its file lies (a YouTube id), or its absolute path
            where there is no such name. Never a bare file stem: those repeat.
        start_seconds, end_seconds: span; counted in whole milliseconds, the finest that data sets publish.
    """
    end_ms = None if end_seconds is None else round(end_seconds * 1000)
    content = _encode_ascii([source, video_key, round(start_seconds * 1000), end_ms])
    return hashlib.sha256(content.encode()).hexdigest()[:_ID_DIGITS]


def write_manifest(path: Path, records: Iterable[ClipRecord]) -> int:
    """Write a manifest whole or not at all, one record at a time; returns the number of records.

    Raises:
        UserError: the target cannot be written.
    """
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with open(temporary, "w", encoding="utf-8") as stream:
            for record in records:
                stream.write(record.to_json() + "\n")
                count += 1

    atomic_write(Path(path), write)
    return count


def read_manifest(path: Path) -> Iterator[ClipRecord]:
    """Records of a manifest in file order, read as they are asked for.

    A relative ``video`` is taken relative to the manifest's folder, so that a manifest can travel with its videos.
    The first record is checked before this function returns.

    Raises:
        UserError: the manifest is missing, empty or unreadable (at once), or a line is malformed (when reached);
            the message names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"manifest={path} does not exist; write it with data_prep/build_manifest.py")
    records = _read_lines(path)
    first = next(records, None)
    if first is None:
        raise UserError(f"manifest={path} holds no clips; write it again with data_prep/build_manifest.py")
    return _chain(first, records)


def _chain(first: ClipRecord, rest: Iterator[ClipRecord]) -> Iterator[ClipRecord]:
    yield first
    yield from rest


def _read_lines(path: Path) -> Iterator[ClipRecord]:
    try:
        with open(path, encoding="utf-8") as stream:
            # A file without line breaks is none of ours, and may be larger than memory.
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), ""), start=1):
                if line.strip():
                    yield parse_record(line, path, number)
    except UnicodeDecodeError as error:
        raise UserError(f"manifest={path} is not UTF-8 text ({error}); write it again") from None
    except OSError as error:
        raise UserError(f"manifest={path} cannot be read: {error.strerror}") from None


def parse_record(line: str, path: Path, number: int) -> ClipRecord:
    """One manifest line as a record; `path` and `number` are for the message.

    Raises:
        UserError: the line is not JSON, or a field is missing, unknown, of the wrong type or out of bounds.
    """
    where = f"manifest={path} line {number}"
    remedy = "write the manifest with data_prep/build_manifest.py"
    try:
        content = parse_row(line)
        if not isinstance(content, dict):
            raise ValueError(f"not a JSON object but {type(content).__name__}")
        return _record_from(content, path.parent)
    except (KeyError, TypeError, ValueError) as error:
        message = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: {message}; {remedy}") from None


def _record_from(content: Mapping[str, Any], folder: Path) -> ClipRecord:
    unknown = sorted(set(content) - set(_FIELD_NAMES))
    if unknown:
        raise ValueError(f"unknown field {shown(unknown[0])}")
    for name in ("clip_id", "source", "video", "caption"):
        if not isinstance(content[name], str):
            raise ValueError(f"{name}={shown(content[name])} must be text")
    clip_id, codec, scores = content["clip_id"], content.get("codec"), content.get("scores", {})
    # The id becomes a file name: nothing that could lead out of a folder.
    if not (
        3 <= len(clip_id) <= _MAX_ID_LETTERS
        and clip_id.isascii()
        and clip_id.replace("-", "").replace("_", "").isalnum()
    ):
        raise ValueError(f"clip_id={shown(clip_id)} must be 3 to {_MAX_ID_LETTERS} letters, digits, - or _")
    _check_path(content["video"])
    if not isinstance(scores, dict):
        raise ValueError(f"scores={shown(scores)} must be an object of numbers")
    if codec is not None and not isinstance(codec, str):
        raise ValueError(f"codec={shown(codec)} must be text")
    start = bounded_number("start_seconds", content["start_seconds"], *_LIMITS["start_seconds"])
    numbers = {
        name: bounded_number(name, content[name], *limits)
        for name, limits in _LIMITS.items()
        if content.get(name) is not None
    }
    width, height = numbers.get("width"), numbers.get("height")
    return ClipRecord(
        clip_id=clip_id,
        source=content["source"],
        # An absolute path stays as it is spelled: the names of a shard's members are not paths to be put in order.
        video=content["video"] if os.path.isabs(content["video"]) else str(folder / content["video"]),
        start_seconds=start,
        end_seconds=numbers.get("end_seconds"),
        # A manifest may come from elsewhere; build_manifest has cleaned and counted the captions of its own.
        caption=clean_caption(content["caption"]).text,
        scores={name: bounded_number(f"scores.{name}", v, -MAX_SCORE, MAX_SCORE) for name, v in scores.items()},
        fps=numbers.get("fps"),
        width=None if width is None else int(width),
        height=None if height is None else int(height),
        duration_seconds=numbers.get("duration_seconds"),
        codec=codec,
        sampling_fps=numbers.get("sampling_fps"),
    )


def _check_path(video: str) -> None:
    if not video:
        raise ValueError("video is empty")
    try:
        encoded = os.fsencode(video)
    except UnicodeEncodeError:
        raise ValueError(f"video={shown(video)} cannot be a file's name: it holds half a character") from None
    if b"\0" in encoded:
        raise ValueError(f"video={shown(video)} cannot be a file's name: it holds a NUL")
