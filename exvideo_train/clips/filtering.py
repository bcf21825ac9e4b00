"""Choosing clips for long-video training: long, uncut, moving, of the right shape, and each only once.

Three passes, each streamed: judge every clip (its measures are journaled, so that another run with other thresholds
decodes nothing again), find duplicates among those left, write what is kept and what is dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from exvideo_train.clips.duplicates import first_alike
from exvideo_train.clips.judging import FilterOptions, Judged, judge_clips
from exvideo_train.clips.quality import ClipMeasures
from exvideo_train.clips.record import parse_record
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write

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


def journal_path(output: Path) -> Path:
    """Measures of all clips judged so far; kept after the run, so that other thresholds cost no decoding."""
    return output.with_name(f"{output.stem}.measures.sqlite")


def filter_dropped_path(output: Path) -> Path:
    """The list of dropped clips with their reasons."""
    return output.with_name(f"{output.stem}.dropped.jsonl")


def filter_manifest(manifest: Path, output: Path, options: FilterOptions, see: Any = None) -> FilterReport:
    """Write the kept clips and the list of dropped ones; both appear whole or not at all.

    Args:
        manifest: clips to choose from.
        output: manifest of the kept clips.
        options: thresholds.
        see: called with (Judged, kept) for every clip, e.g. to draw a report.

    Raises:
        UserError: the manifest is missing or malformed, or no clip is kept.
    """
    if output.resolve() == manifest.resolve():
        raise UserError(f"output={output} is the manifest itself; give another file")
    verdicts = output.with_name(f".{output.name}.filtering")
    hashes, digests = bytearray(), bytearray()
    try:
        with open(verdicts, "w", encoding="utf-8") as stream:
            for judged in judge_clips(manifest, journal_path(output), options):
                stream.write(_to_text(judged) + "\n")
                if not judged.reasons and judged.measures:
                    hashes += bytes.fromhex(judged.measures.hash_hex)
                    digests += bytes.fromhex(judged.digest)
        originals = _duplicates(hashes, digests, options.thresholds.near_duplicate_distance)
        report = FilterReport()
        sink = partial(_write_outcome, verdicts=verdicts, originals=originals, report=report, see=see)
        atomic_write(output, lambda kept: atomic_write(filter_dropped_path(output), partial(sink, kept)))
    except OSError as error:
        raise UserError(f"output={output}: cannot write: {error.strerror}; choose a writable folder") from error
    finally:
        verdicts.unlink(missing_ok=True)
    if not report.num_kept:
        output.unlink()
        counts = ", ".join(f"{reason} {count}" for reason, count in report.first.most_common())
        raise UserError(
            f"output={output}: no clip passes the filters ({counts}); loosen filter.* after a look at the report and "
            f"at {filter_dropped_path(output)}"
        )
    return report


def _write_outcome(
    kept_path: Path, dropped_path: Path, verdicts: Path, originals: Iterator[str], report: FilterReport, see: Any
) -> None:
    seen_ids: set[bytes] = set()
    with (
        open(verdicts, encoding="utf-8") as lines,
        open(kept_path, "w", encoding="utf-8") as kept,
        open(dropped_path, "w", encoding="utf-8") as dropped,
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
            if see is not None:
                see(judged, not judged.reasons)


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
    measures = content["measures"]
    if measures is not None:
        content["measures"] = ClipMeasures(**{**measures, "bars": tuple(measures["bars"])})
    return Judged(**{**content, "record": parse_record(content["record"], Path("/"), 0)})
