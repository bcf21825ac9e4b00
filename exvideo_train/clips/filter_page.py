"""A filter run on one HTML page: the table, histograms of every measure, and random clips kept and dropped.

The page is one file: pictures and charts are inside it, so that it can be mailed or looked at over ssh -L.
"""

from __future__ import annotations

import base64
import html
import io
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from exvideo_train.clips.container import PASSING_REASONS, UnreadableClip
from exvideo_train.clips.decoders.pyav import iter_frames
from exvideo_train.clips.filtering import FilterReport
from exvideo_train.clips.judging import FilterOptions, Judged
from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.workers import Failure, parallel_map
from exvideo_train.terminal import escaped

_NUM_BINS = 40
# Name of the value: (title, lowest and highest bin edge). What lies outside is counted in the end bins.
_RANGES = {
    "duration_seconds": ("duration of the span, s", 0.0, 40.0),
    "fps": ("frame rate of the video", 0.0, 64.0),
    "short_side": ("shorter side, pixels", 0.0, 1600.0),
    "aspect": ("width / height", 0.0, 3.0),
    "caption_words": ("words in the caption", 0.0, 80.0),
    "motion": ("motion, grey levels in half a second", 0.0, 40.0),
    "frozen_share": ("share of time without any change", 0.0, 1.0),
    "black_share": ("share of black frames", 0.0, 1.0),
    "bars_share": ("share of the picture in black bars", 0.0, 0.5),
    "score_aesthetic": ("aesthetic score", 0.0, 10.0),
    "score_umt": ("UMT score", 0.0, 1.0),
    "score_matching": ("matching score", 0.0, 1.0),
}
_THUMBNAIL_HEIGHT, _THUMBNAIL_WIDTH = 108, 192
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#1c1c1c;background:#fff}
table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:right}td:first-child,th:first-child
{text-align:left}.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:1rem}
.clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:.9rem}
figure{margin:0}figcaption{font-size:12px;color:#444;overflow-wrap:anywhere}.strip{display:flex;gap:2px}
.strip img{width:33%;height:auto}.charts img{width:100%}
.key{display:inline-block;width:12px;height:12px}.why{color:#a3230b;font-weight:600}
"""
_KEPT_COLOR, _DROPPED_COLOR = "#2a78b5", "#d9a08a"
# A manifest of a stranger may have any number of scores.
_MOST_CHARTS = 50


@dataclass
class FilterPage:
    """Sees every judged clip once, in bounded memory, and draws the page at the end.

    Args:
        num_shown: random clips shown, of those kept and of those dropped each.
        seed: of the random choice.
    """

    num_shown: int
    seed: int
    num_seen: int = 0
    _counts: dict[str, np.ndarray] = field(default_factory=dict)
    _chosen: dict[bool, list[Judged]] = field(default_factory=lambda: {True: [], False: []})
    _offered: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def see(self, judged: Judged, kept: bool) -> None:
        """Count one clip, and perhaps choose it to be shown (reservoir sampling)."""
        self.num_seen += 1
        for name, value in judged.values().items():
            _, low, high = _RANGES.get(name, (name, 0.0, 1.0))
            counts = self._counts.setdefault(name, np.zeros((2, _NUM_BINS), np.int64))
            share = (min(max(value, low), high) - low) / (high - low)
            place = min(_NUM_BINS - 1, math.floor(share * _NUM_BINS))
            counts[int(not kept), place] += 1
        self._offered[kept] += 1
        chosen = self._chosen[kept]
        if len(chosen) < self.num_shown:
            chosen.append(judged)
        elif (place := self._random.randrange(self._offered[kept])) < self.num_shown:
            chosen[place] = judged

    def write(self, path: Path, options: FilterOptions, report: FilterReport) -> None:
        """Draw the page.

        Raises:
            OSError: it cannot be written.
        """
        geometry = options.geometry
        parts = [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            "<meta name=viewport content='width=device-width'>",
            f"<title>Clips for {geometry.name}</title><style>{_STYLE}</style>",
            f"<h1>Clips for {geometry.name}</h1>",
            f"<p>{self.num_seen:,} clips judged, {self._offered[True]:,} kept. A clip needs "
            f"{geometry.duration_seconds:g} s at {geometry.fps:g} frames a second.</p>",
            "<h2>Kept and dropped</h2>",
            _table(report),
        ]
        parts += ["<h2>Measures</h2><p>"]
        parts += [
            f"<span class=key style='background:{color}'></span> {words}"
            for color, words in ((_KEPT_COLOR, "kept"), (_DROPPED_COLOR, "dropped"))
        ]
        names = _order(self._counts)
        parts += ["</p><div class=charts>", *(_histogram(name, self._counts[name]) for name in names[:_MOST_CHARTS])]
        parts += ["</div>", *([f"<p>{len(names) - _MOST_CHARTS:,} other scores</p>"] if names[_MOST_CHARTS:] else [])]
        for kept, title in ((True, "Kept"), (False, "Dropped")):
            shown = self._chosen[kept]
            # Like every look at a data set's videos, in processes that may die.
            looks = map(_to_look_at, shown)
            strips = list(parallel_map(_thumbnails, looks, options.num_workers, options.timeout_seconds))
            parts += [f"<h2>{title}: {len(shown)} of {self._offered[kept]:,}, at random</h2><div class=clips>"]
            parts += [_figure(judged, strip) for judged, (_, strip) in zip(shown, strips, strict=True)] + ["</div>"]
        parts += ["<h2>Thresholds</h2><table>"]
        parts += [
            f"<tr><td>filter.{_text(name)}<td>{_text(str(value))}" for name, value in vars(options.thresholds).items()
        ]
        path.write_text("\n".join([*parts, "</table></html>"]) + "\n", encoding="utf-8")


def _text(text: str) -> str:
    """What comes from data, as text: names and captions may hold markup, and names what no text can."""
    return html.escape(escaped(text))


def _order(counts: dict[str, np.ndarray]) -> list[str]:
    known = [name for name in _RANGES if name in counts]
    return known + sorted(set(counts) - set(known))


def _table(report: FilterReport) -> str:
    total = max(1, report.num_clips)
    rows = ["<table><tr><th><th>clips<th>share<th>have this reason, others too"]
    rows.append(f"<tr><td>kept<td>{report.num_kept:,}<td>{report.num_kept / total:.1%}<td>")
    if report.num_resampled:
        share = report.num_resampled / total
        rows.append(f"<tr><td>of them at a higher sampling rate<td>{report.num_resampled:,}<td>{share:.1%}<td>")
    for reason, count in report.first.most_common():
        rows.append(f"<tr><td>{_text(reason)}<td>{count:,}<td>{count / total:.1%}<td>{report.all[reason]:,}")
    return "\n".join([*rows, "</table>"])


def _histogram(name: str, counts: np.ndarray) -> str:
    """Kept below, dropped stacked above. Its title is HTML: matplotlib would take a name's dollars for formulas."""
    from matplotlib.figure import Figure

    title, low, high = _RANGES.get(name, (name.replace("_", " "), 0.0, 1.0))
    figure = Figure(figsize=(2.5, 1.1), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(low, high, _NUM_BINS + 1)
    axes.stairs(counts.sum(axis=0), edges, fill=True, color=_DROPPED_COLOR)
    axes.stairs(counts[0], edges, fill=True, color=_KEPT_COLOR)
    axes.set_xticks([low, high], [f"{low:g}", f"{high:g}"])
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=200)
    caption = f"<figcaption>{_text(title)}</figcaption>"
    return f"<figure>{_picture(content.getvalue(), 'png', _text(title))}{caption}</figure>"


def _picture(content: bytes, kind: str, alternative: str = "") -> str:
    return f"<img alt='{alternative}' src='data:image/{kind};base64,{base64.b64encode(content).decode()}'>"


def _to_look_at(judged: Judged) -> ClipRecord | None:
    """A clip whose decoder hung or died is not given to another."""
    return None if PASSING_REASONS.intersection(judged.reasons) else judged.record


def _figure(judged: Judged, strip: str | Failure) -> str:
    record = judged.record
    facts = [f"{name} {value:.3g}" for name, value in judged.values().items()]
    if record.sampling_fps:
        facts.append(f"sampled at {record.sampling_fps:g} fps")
    why = f"<span class=why>{_text(', '.join(judged.reasons))}</span> {_text(judged.detail)}<br>"
    pictures = "" if isinstance(strip, Failure) else strip
    return (
        f"<figure><div class=strip>{pictures}</div><figcaption>{why if judged.reasons else ''}"
        f"{_text(record.caption[:200])}<br>{_text(', '.join(facts))}<br>"
        f"{_text(Path(record.video).name)} {record.start_seconds:g} s, {record.clip_id}</figcaption></figure>"
    )


def _thumbnails(record: ClipRecord | None) -> str:
    """Three moments of a clip as embedded pictures; what cannot be decoded shows none."""
    from PIL import Image

    if record is None:
        return ""
    seconds = record.span_seconds or record.duration_seconds or 1.0
    if record.duration_seconds is not None:
        seconds = min(seconds, record.duration_seconds)
    moments = [max(0.0, record.start_seconds) + share * seconds for share in (0.05, 0.5, 0.9)]
    pictures = []
    try:
        for _, frame_HWC in iter_frames(record.video, moments, _THUMBNAIL_HEIGHT, _THUMBNAIL_WIDTH, num_threads=1):
            content = io.BytesIO()
            Image.fromarray(frame_HWC).save(content, "JPEG", quality=80)
            pictures.append(_picture(content.getvalue(), "jpeg"))
    except UnreadableClip:
        # Its reason stands in the caption already; whatever could be decoded is shown.
        pass
    return "".join(pictures)
