"""How far a run of encode_latents is, and what it did: for a person and as JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from exvideo_train.files import atomic_write_json, atomic_write_text, parse_json, read_regular, short
from exvideo_train.latents.encode_plan import EncodePlan
from exvideo_train.latents.quarantine import Quarantine
from exvideo_train.latents.untrusted import COUNT, Kind, check_fields, exists_inside

LOG_SECONDS = 30.0
_AMOUNT = Kind("a number, 0 or more", lambda value: type(value) in (int, float) and value >= 0)
_MAX_REPORT_BYTES = 1 << 30
_REFUSALS = Kind(
    "an object of texts",
    lambda value: isinstance(value, dict) and all(isinstance(reason, str) for reason in value.values()),
)


@dataclass
class Totals:
    """What one or several encoding processes did, in clips, bytes and seconds of wall time.

    Attributes:
        decode_seconds: inside decoding processes, several at a time.
        encode_seconds: T5 and VAE.
        wait_seconds: the encoder had no decoded clip; the first clip's decoding is in startup_seconds instead.
        write_seconds: writing files, beside the encoder.
        loop_seconds: from the first decoded clip to the end.
    """

    num_encoded: int = 0
    num_bytes: int = 0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    write_seconds: float = 0.0
    startup_seconds: float = 0.0
    loop_seconds: float = 0.0
    quarantined: Counter[str] = field(default_factory=Counter)


_TOTALS = {entry.name: _AMOUNT for entry in fields(Totals)} | {
    "quarantined": Kind("an object", lambda value: isinstance(value, dict))
}


@dataclass
class EncodeReport:
    """Outcome of a run.

    Attributes:
        encoded, reused: clips of the manifest encoded by this run, and by earlier ones.
        quarantined: by reason, of this run's clips and those held back.
        remaining: clips of the manifest still to encode.
        clips_per_second: encoded by all encoders together.
        *_seconds_per_clip: of one encoder; decoding counts its processes' time together.
        wait_share: of the encoders' time without a decoded clip.
        cut_captions: ids of the clips of this geometry in the store whose captions are longer than T5 reads.
        projected_seconds: for the remaining clips; None when nothing was encoded.
        refused_by_decord: why PyAV decoded a clip in decord's place, by clip id, of this geometry in the store.
        unreadable: why, by clip id, of files in the store that could not be read and were left alone.
    """

    encoded: int
    reused: int
    quarantined: dict[str, int]
    remaining: int
    num_encoders: int
    wall_seconds: float
    clips_per_second: float
    decode_seconds_per_clip: float
    encode_seconds_per_clip: float
    wait_seconds_per_clip: float
    write_seconds_per_clip: float
    startup_seconds: float
    wait_share: float
    bytes_written: int
    projected_seconds: float | None
    missing_reports: list[int] = field(default_factory=list)
    num_cut_captions: int = 0
    cut_captions: list[str] = field(default_factory=list)
    refused_by_decord: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """The report as a few lines."""
        total = sum(self.quarantined.values())
        reasons = [f"  {reason:<20} {count}" for reason, count in sorted(self.quarantined.items())]
        lines = [
            f"encoded      {self.encoded}",
            f"reused       {self.reused}",
            f"quarantined  {total}",
            *reasons,
            f"remaining    {self.remaining}",
            f"speed        {self.clips_per_second:.3g} clips/s on {self.num_encoders} encoder(s), "
            f"{self.wall_seconds:.1f} s in all",
            f"a clip       {self.decode_seconds_per_clip:.3g} s decoding, {self.encode_seconds_per_clip:.3g} s "
            f"encoding, {self.wait_seconds_per_clip:.3g} s waiting for frames, "
            f"{self.write_seconds_per_clip:.3g} s writing beside it",
            f"waiting      {self.wait_share:.1%} of the encoders' time",
            f"written      {self.bytes_written / 1e9:.3f} GB",
        ]
        if self.remaining and self.projected_seconds is not None:
            lines.append(f"projected    {_duration(self.projected_seconds)} for the remaining clips")
        if self.refused_by_decord:
            counts = sorted(Counter(self.refused_by_decord.values()).items())
            lines.append(
                f"by PyAV      {len(self.refused_by_decord)} clips in the store that decord cannot be given "
                f"({', '.join(f'{reason} {count}' for reason, count in counts)}); listed under refused_by_decord"
            )
        if self.num_cut_captions:
            lines.append(
                f"warning: {self.num_cut_captions} captions are longer than the text encoder reads: their ends are "
                "cut off; the clips are listed as cut_captions in the report"
            )
        if self.unreadable:
            lines.append(
                f"warning: {len(self.unreadable)} files in the store cannot be read; they are left as they are and not "
                "encoded over, and listed as unreadable in the report: make them readable, or move them away, and run "
                "again"
            )
        if self.missing_reports:
            lines.append(f"note: no figures from rank(s) {self.missing_reports}; their clips are counted all the same")
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def make_report(
    plan: EncodePlan,
    totals: Iterable[Totals],
    encoded: int,
    quarantined: Counter[str],
    wall_seconds: float,
    missing_reports: list[int],
    cut_captions: Sequence[str] = (),
    refused_by_decord: Mapping[str, str] | None = None,
) -> EncodeReport:
    """Put a run's figures together.

    Args:
        plan: what was to be done.
        totals: of each encoding process.
        encoded: of the plan's clips, counted in the store: processes that died have no totals.
        quarantined: of all the manifest's clips, by reason.
        missing_reports: ranks that gave no totals.
        cut_captions: ids of the store's clips with captions that the text encoder has cut.
        refused_by_decord: why, by clip id, of the store's clips that PyAV decoded in decord's place.
    """
    each = list(totals)

    def total(name: str) -> float:
        return float(sum(getattr(one, name) for one in each))

    counted = max(1.0, total("num_encoded"))
    # Encoders work side by side: the run lasts as long as the slowest loop, start-up of processes left out.
    loop_seconds = max((one.loop_seconds for one in each), default=0.0)
    clips_per_second = total("num_encoded") / loop_seconds if loop_seconds else 0.0
    num_new_failures = sum(quarantined.values()) - sum(plan.num_held_back.values())
    remaining = len(plan.pending) - encoded - num_new_failures + plan.num_later
    return EncodeReport(
        encoded=encoded,
        reused=plan.num_reused,
        quarantined=dict(sorted(quarantined.items())),
        remaining=remaining,
        num_encoders=len(each),
        wall_seconds=wall_seconds,
        clips_per_second=clips_per_second,
        decode_seconds_per_clip=total("decode_seconds") / counted,
        encode_seconds_per_clip=total("encode_seconds") / counted,
        wait_seconds_per_clip=total("wait_seconds") / counted,
        write_seconds_per_clip=total("write_seconds") / counted,
        startup_seconds=max((one.startup_seconds for one in each), default=0.0),
        wait_share=total("wait_seconds") / total("loop_seconds") if total("loop_seconds") else 0.0,
        bytes_written=int(total("num_bytes")),
        projected_seconds=remaining / clips_per_second if clips_per_second else None,
        missing_reports=missing_reports,
        num_cut_captions=len(cut_captions),
        cut_captions=list(cut_captions),
        refused_by_decord=dict(sorted((refused_by_decord or {}).items())),
        unreadable=dict(sorted(plan.unreadable.items())),
    )


def write_report(report: EncodeReport, quarantine: Quarantine) -> Path:
    """Write the report as JSON, and the quarantined clips with their reasons as JSON lines beside it."""
    path = _report_path(quarantine)
    atomic_write_json(path, asdict(report))
    lines = [json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in quarantine]
    atomic_write_text(path.with_name(f"quarantined_{quarantine.geometry.name}.jsonl"), "".join(lines))
    return path


def _report_path(quarantine: Quarantine) -> Path:
    return quarantine.folder.parent.parent / f"encode_{quarantine.geometry.name}.json"


def earlier_refusals(quarantine: Quarantine) -> dict[str, str]:
    """`EncodeReport.refused_by_decord` of the report that the next one replaces; only clips' own files have it too."""
    path = _report_path(quarantine)
    try:
        if not exists_inside(quarantine.store_path, path):
            return {}
        content = check_fields(parse_json(read_regular(path, _MAX_REPORT_BYTES)), {"refused_by_decord": _REFUSALS})
    except (ValueError, OSError) as error:
        print(f"note: the clips that PyAV decoded for earlier runs are not listed again: {path}: {error}", flush=True)
        return {}
    refusals: dict[str, str] = content["refused_by_decord"]
    return refusals


def totals_to_json(totals: list[Totals]) -> list[dict[str, Any]]:
    """Totals as JSON, for another machine to read."""
    # asdict would rebuild the Counter from its items, and so count them.
    return [{**vars(one), "quarantined": dict(one.quarantined)} for one in totals]


def totals_from_json(content: Any) -> list[Totals]:
    """The inverse of :func:`totals_to_json`.

    Raises:
        ValueError: it is of another shape.
    """
    if not isinstance(content, list):
        raise ValueError(f"{short(content)} is no list of totals")
    each = [check_fields(one, _TOTALS, others=False) for one in content]
    for one in each:
        check_fields(one["quarantined"], dict.fromkeys(one["quarantined"], COUNT))
    return [Totals(**{**one, "quarantined": Counter(one["quarantined"])}) for one in each]


class Progress:
    """A bar on a terminal, a line now and then in a log file. Called with a settled clip's id; twice counts once."""

    def __init__(self, num_clips: int) -> None:
        from tqdm import tqdm

        on_terminal = sys.stderr.isatty()
        self._settled: set[str] = set()
        self._bar: Any = tqdm(
            total=num_clips,
            unit="clip",
            desc="encoding",
            dynamic_ncols=on_terminal,
            mininterval=0.5 if on_terminal else LOG_SECONDS,
        )

    def __call__(self, clip_id: str) -> None:
        if clip_id not in self._settled:
            self._settled.add(clip_id)
            self._bar.update()

    def close(self) -> None:
        self._bar.close()
