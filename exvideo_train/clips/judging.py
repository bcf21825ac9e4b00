"""One clip judged: what is measured of it, and every reason against it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from exvideo_train.clips.container import Reason, UnreadableClip, VideoInfo, open_bytes, probe_video
from exvideo_train.clips.decoders.timing import TIME_TOLERANCE_SECONDS
from exvideo_train.clips.journal import journaled_map
from exvideo_train.clips.probing import with_info
from exvideo_train.clips.quality import ClipMeasures, bars_in_crop, measure_clip
from exvideo_train.clips.record import ClipRecord, read_manifest
from exvideo_train.clips.workers import Failure
from exvideo_train.config.clips import FilterThresholds
from exvideo_train.geometry import Geometry

# Raise it whenever the same video would give other measures: journals of older versions are then not used.
_MEASURES_VERSION = 1
# A rate this much under the sampling rate still passes: 23.976 for 24.
_FPS_TOLERANCE = 0.985


@dataclass(frozen=True)
class FilterOptions:
    """What clips are for, and how they are judged; see `exvideo_train.config.clips` for units and reasons."""

    geometry: Geometry
    thresholds: FilterThresholds
    num_workers: int = 0
    timeout_seconds: float = 300.0
    progress: bool = True


@dataclass
class Judged:
    """A clip with what was measured and every reason against it."""

    record: ClipRecord
    reasons: list[str]
    detail: str = ""
    measures: ClipMeasures | None = None
    digest: str = ""

    def values(self) -> dict[str, float]:
        """The numbers that thresholds judge, as far as they are known."""
        record = self.record
        found: dict[str, float | None] = {
            "duration_seconds": record.span_seconds,
            "fps": record.fps,
            "short_side": min(record.width, record.height) if record.width and record.height else None,
            "aspect": record.width / record.height if record.width and record.height else None,
            "caption_words": float(len(record.caption.split())),
        }
        found |= {f"score_{name}": value for name, value in record.scores.items()}
        if self.measures:
            found["motion"] = self.measures.motion
            found["frozen_share"] = self.measures.frozen_share
            found["black_share"] = self.measures.black_share
            found["bars_share"] = 1 - (1 - sum(self.measures.bars[:2])) * (1 - sum(self.measures.bars[2:]))
        return {name: float(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class _Finding:
    """What one worker finds out about a clip."""

    info: VideoInfo | None = None
    measures: ClipMeasures | None = None
    digest: str = ""
    reason: str = ""
    detail: str = ""


def judge_clips(manifest: Path, journal_file: Path, options: FilterOptions) -> Iterator[Judged]:
    """Every clip of the manifest with its measures and all reasons against it, in the manifest's order."""
    results = journaled_map(
        _analyse,
        _to_analyse(manifest, options),
        journal_file,
        _finding_from,
        options.num_workers,
        options.timeout_seconds,
        tasks_per_worker=200,
        ahead_per_worker=64,
    )
    bar = tqdm(results, "judging clips", _count_lines(manifest), unit="clip", disable=not options.progress)
    for (record, reasons), found in bar:
        if found is None:
            yield Judged(record, reasons)
        elif isinstance(found, Failure):
            yield Judged(record, [found.reason], found.detail)
        else:
            yield judge(record, found, options)


_Task = tuple[str, float, float | None, float, float]


def _to_analyse(
    manifest: Path, options: FilterOptions
) -> Iterator[tuple[tuple[ClipRecord, list[str]], str, str, _Task | None]]:
    """Clips with the reasons against them that need no look, key in the journal, video, and task if one is needed."""
    for record in read_manifest(manifest):
        reasons = reasons_from_metadata(record, options)
        task = (record.video, record.start_seconds, record.end_seconds, *_needed_seconds(options))
        yield (record, reasons), f"{_MEASURES_VERSION} {task}", record.video, None if reasons else task


def _count_lines(manifest: Path) -> int:
    next(read_manifest(manifest))
    with open(manifest, "rb") as stream:
        return sum(piece.count(b"\n") for piece in iter(lambda: stream.read(1 << 20), b""))


def _finding_from(text: str) -> _Finding:
    content = json.loads(text)
    if content["info"] is not None:
        content["info"] = VideoInfo(**content["info"])
    if content["measures"] is not None:
        content["measures"] = ClipMeasures.from_json(content["measures"])
    return _Finding(**content)


def _needed_seconds(options: FilterOptions) -> tuple[float, float]:
    """Least and greatest length of the frames used, at the greatest and at the experiment's sampling rate."""
    geometry = options.geometry
    fastest = max(options.thresholds.max_fps, geometry.fps)
    return (geometry.num_frames - 1) / fastest, geometry.duration_seconds


def _analyse(task: _Task) -> _Finding:
    """One worker's task: probe, and measure the frames that training would use if there are enough."""
    video, start, end, least_seconds, most_seconds = task
    info = None
    try:
        if start < 0 or (end is not None and end <= start):
            raise UnreadableClip(Reason.BAD_SPAN, f"span {start:g}..{end if end is None else format(end, 'g')} s")
        info = probe_video(video)
        length = info.duration_seconds
        if length is not None and start >= length:
            raise UnreadableClip(Reason.SPAN_PAST_END, f"start {start:.3f} s of a video of {length:.3f} s")
        known_ends = [moment for moment in (end, length) if moment is not None]
        last = min(known_ends) if known_ends else start + most_seconds
        if last - start < least_seconds - TIME_TOLERANCE_SECONDS:
            return _Finding(info)
        measures = measure_clip(video, start, min(last, start + most_seconds))
    except UnreadableClip as error:
        return _Finding(info, reason=error.reason, detail=error.detail)
    return _Finding(info, measures, _content_digest(video, start, end))


def _content_digest(video: str, start: float, end: float | None) -> str:
    """Equal for copies of a file with the same span: its size and pieces of its content, not its name."""
    digest = hashlib.blake2b(repr((round(start, 3), end)).encode(), digest_size=8)
    with open_bytes(video) as (stream, size):
        digest.update(str(size).encode())
        for share in (0.0, 0.5, 1.0):
            stream.seek(int(share * max(0, size - (1 << 16))))
            digest.update(stream.read(1 << 16))
    return digest.hexdigest()


def reasons_from_metadata(record: ClipRecord, options: FilterOptions) -> list[str]:
    """Reasons against a clip that need no look at its video."""
    thresholds = options.thresholds
    reasons = []
    if len(record.caption.split()) < thresholds.min_caption_words:
        reasons.append("caption")
    reasons += [
        f"score_{name}"
        for name, least in sorted(thresholds.min_scores.items())
        if name in record.scores and record.scores[name] < least
    ]
    if record.end_seconds is not None and record.end_seconds > record.start_seconds >= 0:
        reasons += _duration_reasons(record.end_seconds - record.start_seconds, options)
    return reasons


def _duration_reasons(seconds: float, options: FilterOptions) -> list[str]:
    least, _ = _needed_seconds(options)
    if seconds < least - TIME_TOLERANCE_SECONDS:
        return ["too_short"]
    longest = options.thresholds.max_duration_seconds
    return ["too_long"] if longest and seconds > longest else []


def judge(record: ClipRecord, finding: _Finding, options: FilterOptions) -> Judged:
    """A clip's reasons, from what a worker found."""
    if finding.reason:
        return Judged(record, [finding.reason], finding.detail)
    assert finding.info is not None
    record = with_info(record, finding.info)
    reasons = [] if record.duration_seconds is None else _duration_reasons(record.duration_seconds, options)
    record, fps_reasons = _with_sampling_rate(record, options)
    reasons += fps_reasons + _shape_reasons(record, options)
    if finding.measures is not None:
        reasons += _picture_reasons(record, finding.measures, options)
    return Judged(record, reasons, "", finding.measures, finding.digest)


def _with_sampling_rate(record: ClipRecord, options: FilterOptions) -> tuple[ClipRecord, list[str]]:
    """The clip with the least rate at which its length suffices, and whether its video is fast enough for it."""
    geometry, thresholds = options.geometry, options.thresholds
    rate, own = geometry.fps, None
    seconds = record.duration_seconds
    if seconds and thresholds.max_fps > rate and seconds < geometry.duration_seconds - TIME_TOLERANCE_SECONDS:
        rate = own = min(thresholds.max_fps, math.ceil((geometry.num_frames - 1) / seconds * 1000) / 1000)
    least = thresholds.min_source_fps or rate
    slow = record.fps is not None and record.fps < least * _FPS_TOLERANCE
    return dataclasses.replace(record, sampling_fps=own), ["low_fps"] if slow else []


def _shape_reasons(record: ClipRecord, options: FilterOptions) -> list[str]:
    geometry, thresholds = options.geometry, options.thresholds
    assert record.width
    assert record.height
    aspect = record.width / record.height
    reasons = []
    if min(record.width, record.height) < (thresholds.min_short_side or min(geometry.height, geometry.width)):
        reasons.append("too_small")
    if not thresholds.min_aspect <= aspect <= thresholds.max_aspect:
        reasons.append("aspect")
    return reasons


def _picture_reasons(record: ClipRecord, measures: ClipMeasures, options: FilterOptions) -> list[str]:
    geometry, thresholds = options.geometry, options.thresholds
    assert record.width
    assert record.height
    bars = bars_in_crop(measures.bars, record.width / record.height, geometry.width / geometry.height)
    checks = [
        ("black", measures.black_share > thresholds.max_black_share),
        ("scene_cut", measures.num_cuts(thresholds.cut_threshold, thresholds.min_cut_content) > thresholds.max_cuts),
        ("frozen", measures.frozen_share > thresholds.max_frozen_share),
        ("still", measures.motion < thresholds.min_motion),
        ("letterboxed", bars > thresholds.max_letterbox_share),
    ]
    return [reason for reason, holds in checks if holds]
