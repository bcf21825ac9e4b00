"""Choosing clips for long-video training: long, uncut, moving, of the right shape, and each only once.

Three passes, each streamed: judge every clip (its measures are journaled, so that another run with other thresholds
decodes nothing again), find duplicates among those left, write what is kept and what is dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exvideo_train.clips.duplicates import first_alike
from exvideo_train.clips.judging import FilterOptions, Judged, judge_clips
from exvideo_train.clips.quality import ClipMeasures
from exvideo_train.clips.record import parse_record
from exvideo_train.clips.target import dropped_path, failed_path, measures_path, report_path
from exvideo_train.errors import UserError
from exvideo_train.files import publish

if TYPE_CHECKING:
    from exvideo_train.clips.filter_page import FilterPage

EXACT_DUPLICATE = "exact_duplicate"
NEAR_DUPLICATE = "near_duplicate"


@dataclass
class FilterReport:
    """What was kept and dropped; `first` counts each dropped clip once, `all` under every reason it has."""

    num_kept: int = 0
    num_resampled: int = 0
    first: Counter[str] = field(default_factory=Counter)
    all: Counter[str] = field(default_factory=Counter)

    @property
    def num_clips(self) -> int:
        return self.num_kept + sum(self.first.values())

    def lines(self) -> list[str]:
        """A table for a person: kept, and dropped for each reason."""
        total = max(1, self.num_clips)
        rows = [("clips", self.num_clips, "", ""), ("kept", self.num_kept, f"{self.num_kept / total:.1%}", "")]
        if self.num_resampled:
            rows.append(("  at a higher sampling rate", self.num_resampled, f"{self.num_resampled / total:.1%}", ""))
        rows += [
            (f"dropped: {reason}", count, f"{count / total:.1%}", f"{self.all[reason]:,} have it")
            for reason, count in sorted(self.first.items(), key=lambda entry: (-entry[1], entry[0]))
        ]
        width = max(len(row[0]) for row in rows)
        return [f"{name:<{width}}  {count:>10,}  {share:>6}  {note}".rstrip() for name, count, share, note in rows]


def filter_manifest(
    manifest: Path, output: Path, options: FilterOptions, page: FilterPage | None = None
) -> FilterReport:
    """Write the kept clips, the list of dropped ones and the page; all replace older ones when they are whole.

    The caller holds the target (`exvideo_train.clips.target.hold_target`).

    Args:
        manifest: clips to choose from.
        output: manifest of the kept clips.
        options: thresholds.
        page: sees every clip and draws the report.

    Raises:
        UserError: the manifest is missing or malformed, or no clip is kept: then list and page are written all the
            same, beside those of a result that is there already.
    """
    folder = output.with_name(f".{output.name}.filter")
    kept, dropped, drawn, verdicts = (folder / name for name in ("kept", "dropped", "page", "verdicts"))
    report = FilterReport()
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        originals = _judge(manifest, measures_path(output), options, verdicts)
        _write_outcome(kept, dropped, verdicts, originals, report, page)
        lists = output if report.num_kept else failed_path(output)
        finished = {dropped: dropped_path(lists)}
        if page is not None:
            page.write(drawn, options, report)
            finished[drawn] = report_path(lists)
        publish({**finished, kept: output} if report.num_kept else finished)
    except OSError as error:
        raise UserError(f"output={output}: cannot write: {error.strerror}; choose a writable folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not report.num_kept:
        counts = ", ".join(f"{reason} {count}" for reason, count in report.first.most_common())
        raise UserError(
            f"output={output}: no clip passes the filters ({counts}); loosen filter.* after a look at "
            f"{' and '.join(str(path) for path in reversed(finished.values()))}"
        )
    return report


def _judge(manifest: Path, journal: Path, options: FilterOptions, verdicts: Path) -> Iterator[str]:
    """Write what is found of every clip; returns for each passing one in order whether it is a duplicate."""
    hashes, digests = bytearray(), bytearray()
    with open(verdicts, "w", encoding="utf-8") as stream:
        for judged in judge_clips(manifest, journal, options):
            stream.write(_to_text(judged) + "\n")
            if not judged.reasons and judged.measures:
                hashes += bytes.fromhex(judged.measures.hash_hex)
                digests += bytes.fromhex(judged.digest)
    return _duplicates(hashes, digests, options.thresholds.near_duplicate_distance)


def _write_outcome(
    kept_to: Path,
    dropped_to: Path,
    verdicts: Path,
    originals: Iterator[str],
    report: FilterReport,
    page: FilterPage | None,
) -> None:
    seen_ids: set[bytes] = set()
    with (
        open(verdicts, encoding="utf-8") as lines,
        open(kept_to, "w", encoding="utf-8") as kept,
        open(dropped_to, "w", encoding="utf-8") as dropped,
    ):
        for line in lines:
            judged = _from_text(line)
            if not judged.reasons and judged.measures:
                duplicate = next(originals)
                identity = bytes.fromhex(hashlib.blake2b(judged.record.clip_id.encode(), digest_size=8).hexdigest())
                if identity in seen_ids:
                    duplicate = EXACT_DUPLICATE
                seen_ids.add(identity)
                if duplicate:
                    judged.reasons.append(duplicate)
                    judged.detail = "an earlier clip of the manifest shows the same"
            report.all.update(judged.reasons)
            if judged.reasons:
                report.first[judged.reasons[0]] += 1
                dropped.write(_drop_text(judged) + "\n")
            else:
                report.num_kept += 1
                report.num_resampled += judged.record.sampling_fps is not None
                kept.write(judged.record.to_json() + "\n")
            if page is not None:
                page.see(judged, not judged.reasons)


def _duplicates(hashes: bytearray, digests: bytearray, max_distance: int) -> Iterator[str]:
    """For each passing clip in order the reason of its being a duplicate, or nothing."""
    hash_rows = np.frombuffer(bytes(hashes), np.uint8).reshape(-1, 24)
    digest_rows = np.frombuffer(bytes(digests), np.uint64)
    near = first_alike(hash_rows, max_distance)
    _, first_of, inverse = np.unique(digest_rows, return_index=True, return_inverse=True)
    exact = first_of[inverse] != np.arange(len(digest_rows))
    for is_exact, original in zip(exact, near, strict=True):
        yield EXACT_DUPLICATE if is_exact else NEAR_DUPLICATE if original >= 0 else ""


def _drop_text(judged: Judged) -> str:
    record = judged.record
    content = {
        "clip_id": record.clip_id,
        "reason": judged.reasons[0],
        "reasons": judged.reasons,
        "detail": judged.detail,
        "video": record.video,
        "start_seconds": record.start_seconds,
        "end_seconds": record.end_seconds,
        "values": {name: round(value, 4) for name, value in judged.values().items()},
    }
    return json.dumps({key: value for key, value in content.items() if value not in ("", None)})


def _to_text(judged: Judged) -> str:
    return json.dumps({**dataclasses.asdict(judged), "record": judged.record.to_json()})


def _from_text(line: str) -> Judged:
    content = json.loads(line)
    if content["measures"] is not None:
        content["measures"] = ClipMeasures.from_json(content["measures"])
    return Judged(**{**content, "record": parse_record(content["record"], Path("/"), 0)})
