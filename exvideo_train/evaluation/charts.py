"""Pictures of the report: curves over time with bands, and contact sheets; every one as a data: URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from exvideo_train.evaluation.track import Track

# Okabe and Ito's palette, told apart by colour-blind eyes too; dashes tell them apart in black and white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES = ("-", "--", "-.", ":")
_NUM_SHOWN = 6
NUM_MOMENTS = 200


def style_of(number: int) -> tuple[str, str]:
    """Colour and dashes of a variant."""
    return COLORS[number % len(COLORS)], _DASHES[number % len(_DASHES)]


def data_uri(content: bytes, kind: str) -> str:
    """Content as an address that needs no request."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def curve_chart(series: str, tracks: Mapping[str, Sequence[Track]]) -> str:
    """One measure over seconds: for each variant the mean of its videos and a band of one standard deviation.

    Variants' names are not drawn: matplotlib would take a name's dollars for formulas.
    """
    figure = Figure(figsize=(4.2, 2.1), layout="constrained")
    axes = figure.subplots()
    for number, videos in enumerate(tracks.values()):
        color, dashes = style_of(number)
        seconds = np.linspace(0.0, max(length(track) for track in videos), NUM_MOMENTS)
        mean, deviation = mean_curve(series, videos, seconds)
        axes.fill_between(seconds, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)
        axes.plot(seconds, mean, color=color, linestyle=dashes, linewidth=1.6)
    axes.set_xlabel("seconds")
    axes.margins(x=0)
    axes.spines[["right", "top"]].set_visible(False)
    content = io.BytesIO()
    # Neither date nor random names: equal results are an equal report.
    with rc_context({"svg.hashsalt": series}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return data_uri(content.getvalue(), "image/svg+xml")


def mean_curve(series: str, videos: Sequence[Track], seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over those of the videos that last so long, NaN where none does."""
    curves = np.stack([_at(track, series, seconds) for track in videos])
    counts = np.isfinite(curves).sum(axis=0)
    mean = np.where(counts > 0, np.nansum(curves, axis=0) / np.maximum(counts, 1), np.nan)
    return mean, np.sqrt(np.nansum((curves - mean) ** 2, axis=0) / np.maximum(counts, 1))


def length(track: Track) -> float:
    """Seconds from the first frame to the last."""
    return float(track.seconds[-1] - track.seconds[0])


def _at(track: Track, series: str, seconds: np.ndarray) -> np.ndarray:
    """A track's values at these moments, NaN where it has none."""
    values = getattr(track, series)
    is_there = np.isfinite(values)
    if not is_there.any():
        return np.full(len(seconds), np.nan)
    moments = track.seconds[is_there] - track.seconds[0]
    return np.asarray(np.interp(seconds, moments, values[is_there], left=np.nan, right=np.nan))


def contact_sheet(track: Track) -> list[tuple[float, str]]:
    """(seconds, picture) of frames evenly spread from the first to the last."""
    places = np.unique(np.linspace(0, len(track.shown) - 1, _NUM_SHOWN).round().astype(int))
    return [(track.shown[place][0], data_uri(track.shown[place][1], "image/jpeg")) for place in places]
