"""Data set metadata and videos -> a manifest: streamed, sorted, without duplicates, probed in parallel.

Rows are parsed in worker processes and sorted on disk: neither the metadata nor the manifest is ever in memory, and the
result depends on neither the order of the rows nor the number of workers.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from exvideo_train.clips.container import Reason, VideoInfo
from exvideo_train.clips.probing import probe_videos, with_info
from exvideo_train.clips.record import ClipRecord, parse_record
from exvideo_train.clips.sorting import ClipRow, SortedRows, clip_row
from exvideo_train.clips.sources.base import KEPT_REASONS, Dropped, RawRows, Source
from exvideo_train.clips.target import dropped_path, failed_path, working_folder
from exvideo_train.clips.workers import Failure, parallel_map
from exvideo_train.errors import UserError
from exvideo_train.files import publish

DUPLICATE = "duplicate"
_PROBES = "probes.sqlite"
_SORTING = "sorting"
# Letters of one text in the list of drops: what was dropped for its size is not to be found there in full.
_MAX_DETAIL = 1000
_PARSE_TIMEOUT_SECONDS = 3600.0
# How far a span's end may lie beyond the last frame, and a cut video's length from the span's.
_SPAN_TOLERANCE_SECONDS = 1.0
_CUT_TOLERANCE_SECONDS = 0.5


@dataclass
class ManifestReport:
    """What became of a data set's rows."""

    num_clips: int = 0
    num_videos: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """A table for a person."""
        rows = [("clips", self.num_clips), ("videos", self.num_videos)]
        rows += [
            (f"{'clip kept' if reason in KEPT_REASONS else 'dropped'}: {reason}", count)
            for reason, count in sorted(self.dropped.items())
        ]
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {count:>12,}" for name, count in rows]


@dataclass(frozen=True)
class BuildOptions:
    """How a manifest is built; see `exvideo_train.config.clips.BuildManifest` for units and reasons."""

    probe: bool = True
    num_workers: int = 0
    timeout_seconds: float = 60.0
    progress: bool = True


def clear_working_folder(manifest: Path) -> None:
    """Remove a manifest's temporary files, all but the journal of probes, which the next attempt goes on from."""
    folder = working_folder(manifest)
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _PROBES:
            entry.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def build_manifest(source: Source, manifest: Path, options: BuildOptions) -> ManifestReport:
    """Write the manifest of a data set and the list of its drops; both replace older ones when they are whole.

    The caller holds the target (`exvideo_train.clips.target.hold_target`). A run that was killed is continued
    by the same call: videos probed already are not opened again.

    Args:
        source: the data set.
        manifest: file to write.
        options: probing and processes.

    Raises:
        UserError: no clip at all can be used, or the target cannot be written.
    """
    folder = working_folder(manifest)
    sorting = folder / _SORTING
    try:
        shutil.rmtree(sorting, ignore_errors=True)
        sorting.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"manifest={manifest}: cannot write {folder}: {error.strerror}; choose a writable folder"
        ) from None
    report = ManifestReport()
    clips, dropped = folder / "clips.jsonl", folder / "dropped.jsonl"
    with closing(SortedRows(sorting / "rows.sqlite")) as rows, open(dropped, "w", encoding="utf-8") as drops:
        num_rows = _parse(source, rows, options)
        for line in rows.dropped():
            report.dropped[json.loads(line)["reason"]] += 1
            drops.write(line)
        lines = _without_duplicates(rows.clips(), report, drops)
        if options.probe:
            lines = _probed(lines, source.may_be_cut, folder / _PROBES, options, report, drops)
        bar = tqdm(lines, "writing clips", num_rows, unit="clip", unit_scale=True, disable=not options.progress)
        _write_clips(clips, bar, report)
    if report.num_clips == 0:
        listed = dropped_path(failed_path(manifest))
        publish({dropped: listed})
        raise UserError(_why_empty(manifest, listed, report))
    publish({dropped: dropped_path(manifest), clips: manifest})
    shutil.rmtree(folder)
    return report


def _why_empty(manifest: Path, listed: Path, report: ManifestReport) -> str:
    counts = ", ".join(f"{reason} {count}" for reason, count in report.dropped.most_common()) or "no rows"
    return (
        f"manifest={manifest}: no clip can be used ({counts}; listed in {listed}). Check that videos= is the folder "
        "whose files are named by the ids in metadata=; output of video2dataset needs source=webdataset"
    )


def _parse(source: Source, rows: SortedRows, options: BuildOptions) -> int:
    """Parse everything; returns the number of clips, duplicates included."""
    num_clips = 0
    with tqdm(
        total=source.total_progress(),
        unit=source.progress_unit,
        unit_scale=True,
        desc="reading metadata",
        disable=not options.progress,
    ) as bar:
        results = parallel_map(
            partial(_parse_piece, source),
            source.pieces(),
            options.num_workers,
            _PARSE_TIMEOUT_SECONDS,
            tasks_per_worker=10**9,
            ahead_per_worker=2,
        )
        for piece, found in results:
            if isinstance(found, Failure):
                raise UserError(f"{piece.where}: reading it failed: {found.detail}")
            clips, dropped = found
            rows.add(clips, dropped)
            num_clips += len(clips)
            bar.update(piece.progress)
    return num_clips


def _parse_piece(source: Source, piece: RawRows) -> tuple[list[ClipRow], list[str]]:
    """One worker's task: clips and drops of a piece."""
    clips: list[ClipRow] = []
    drops: list[str] = []
    try:
        for entry in source.parse(piece):
            if isinstance(entry, ClipRecord):
                clips.append(clip_row(entry))
            else:
                drops.append(_drop_line(entry))
    except OSError as error:
        # A traceback from a worker would hide what a user can repair: a folder that may not be read.
        raise UserError(f"{piece.where}: {error.filename}: {error.strerror}; repair it, then run again") from None
    return clips, drops


def _drop_line(drop: Dropped) -> str:
    content = {name: value for name, value in vars(drop).items() if value not in ("", None)}
    content = {name: value[:_MAX_DETAIL] if isinstance(value, str) else value for name, value in content.items()}
    return json.dumps(content, ensure_ascii=True) + "\n"


def _without_duplicates(
    rows: Iterable[tuple[bytes, str, str]], report: ManifestReport, drops: TextIO
) -> Iterator[tuple[bytes, str]]:
    """(video, JSON) with each id once: of rows with equal source, video and span the first in sorted order stays."""
    previous = ""
    for video, clip_id, content in rows:
        if clip_id == previous:
            report.dropped[DUPLICATE] += 1
            record = parse_record(content, Path("/"), 0)
            drops.write(_drop_line(_dropped(record, DUPLICATE, "same source, video and span as a clip before it")))
            continue
        previous = clip_id
        yield video, content


def _dropped(record: ClipRecord, reason: str, detail: str) -> Dropped:
    return Dropped(reason, detail, record.clip_id, record.video, record.start_seconds, record.end_seconds)


def _probed(
    lines: Iterator[tuple[bytes, str]],
    may_be_cut: bool,
    journal_path: Path,
    options: BuildOptions,
    report: ManifestReport,
    drops: TextIO,
) -> Iterator[tuple[bytes, str]]:
    """Fill in what probing finds, each video opened once; drop clips whose video or span is unusable."""
    groups = (
        (video.decode("utf-8", "surrogatepass"), [text for _, text in group])
        for video, group in groupby(lines, key=lambda line: line[0])
    )
    for texts, found in probe_videos(groups, journal_path, options.num_workers, options.timeout_seconds):
        for text in texts:
            record = parse_record(text, Path("/"), 0)
            result = (
                found if isinstance(found, Failure) else _probed_record(record, found, may_be_cut and len(texts) == 1)
            )
            if isinstance(result, Failure):
                report.dropped[result.reason] += 1
                drops.write(_drop_line(_dropped(record, result.reason, result.detail)))
            else:
                yield record.video.encode("utf-8", "surrogatepass"), result.to_json()


def _probed_record(record: ClipRecord, info: VideoInfo, may_be_cut: bool) -> ClipRecord | Failure:
    length = info.duration_seconds
    start, end = record.start_seconds, record.end_seconds
    if length is not None and end is not None and end > length + _SPAN_TOLERANCE_SECONDS:
        if may_be_cut and abs(length - (end - start)) <= _CUT_TOLERANCE_SECONDS:
            start, end = 0.0, None
        else:
            return Failure(Reason.SPAN_PAST_END.value, f"span {start:.3f}..{end:.3f} s of a video of {length:.3f} s")
    if length is not None and start >= length:
        return Failure(Reason.SPAN_PAST_END.value, f"start {start:.3f} s of a video of {length:.3f} s")
    return with_info(dataclasses.replace(record, start_seconds=start, end_seconds=end), info)


def _write_clips(path: Path, lines: Iterable[tuple[bytes, str]], report: ManifestReport) -> None:
    previous = b""
    with open(path, "w", encoding="utf-8") as stream:
        for video, content in lines:
            stream.write(content + "\n")
            report.num_clips += 1
            report.num_videos += video != previous
            previous = video
