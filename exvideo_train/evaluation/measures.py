"""Measures of a whole video, made of its track. Each is one number; None where a video is too short for it.

What each sees and misses stands in docs/evaluation.md. Axis letters: F frames, D values of a tiny picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from exvideo_train.clips.quality import hard_cuts
from exvideo_train.evaluation.track import Track

# FramePack's drift compares the first with the last 15 % of frames.
END_SHARE = 0.15
# A cut's change is so many times that of the frames around it, and so many levels: filter_clips' own thresholds.
_CUT_RATIO, _CUT_LEVELS = 3.0, 15.0
_STILL_WINDOW_SECONDS, _STILL_LEVELS = 0.5, 0.3
# Repetition sooner than this is motion that swings, a tail or a pendulum.
_LEAST_LAG_SECONDS = 1.0
_NOISE_LEVELS = 1.0
# NoRepeat: the second begins within this share of the expected moment, and repeats if it is closer to the opening than
# this share of what a frame of the video differs from the opening on average.
_REPEAT_SEARCH_SHARE, _REPEAT_SEGMENT_SECONDS, _REPEAT_THRESHOLD = 0.25, 1.0, 0.5


class Better(Enum):
    """Which way a measure should go."""

    higher = "higher"
    lower = "lower"
    neither = "neither"


@dataclass(frozen=True)
class Measure:
    """What a number is.

    Attributes:
        unit: of the number, with its range.
    """

    name: str
    title: str
    unit: str
    better: Better
    source: str
    function: Callable[[Track], float | None]


def _ends(values_F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the first and of the last 15 % of frames, at least one each."""
    count = max(1, round(END_SHARE * len(values_F)))
    return values_F[:count].mean(axis=0), values_F[-count:].mean(axis=0)


def kept(values_F: np.ndarray) -> float | None:
    """Last over first: 1 nothing lost, 0 all; None where there was nothing at first."""
    first, last = _ends(values_F)
    return float(last / first) if first > 0 else None


def slope(values_F: np.ndarray, seconds_F: np.ndarray) -> float | None:
    """Slope of the least-squares line, as a share of the mean a second."""
    mean = float(values_F.mean())
    if len(values_F) < 3 or mean <= 0:
        return None
    return float(np.polyfit(seconds_F - seconds_F[0], values_F, 1)[0]) / mean


def drift(values_F: np.ndarray) -> float:
    """Distance between the means of the two ends; of vectors, the Euclidean one."""
    first, last = _ends(values_F)
    return float(np.linalg.norm(np.atleast_1d(last - first)))


def content_drift(track: Track) -> float:
    """One minus the correlation of the averaged tiny pictures of the two ends: 0 the same scene, 1 another."""
    first, last = (end - end.mean() for end in _ends(track.thumbs_FHWC))
    norms = np.linalg.norm(first) * np.linalg.norm(last)
    # Two even pictures are the same scene, whatever their brightness.
    return 1.0 - float((first * last).sum() / norms) if norms > first.size * _NOISE_LEVELS**2 else 0.0


def flicker(track: Track) -> float | None:
    """VBench's temporal_flickering: 1 - mean absolute difference of neighbouring frames / 255."""
    return 1.0 - float(np.nanmean(track.change)) / 255 if track.num_frames > 1 else None


def luminance_jitter(track: Track) -> float | None:
    """Mean absolute second difference of mean luminance, halved: a light that goes on and off by d gives d."""
    if track.num_frames < 3:
        return None
    return float(np.abs(np.diff(track.luminance, n=2)).mean()) / 2


def motion(track: Track) -> float | None:
    """Mean length of the flow."""
    return float(np.nanmean(track.motion)) if track.num_frames > 1 else None


def smoothness(track: Track) -> float | None:
    """One minus the mean roughness of the flow."""
    return 1.0 - float(np.nanmean(track.roughness)) if track.num_frames > 2 else None


def still_share(track: Track) -> float | None:
    """Share of half seconds in which the picture does not change."""
    seconds = track.seconds
    ends = np.flatnonzero(seconds >= seconds[0] + _STILL_WINDOW_SECONDS - 1e-3)
    if not len(ends):
        return None
    starts = np.searchsorted(seconds, seconds[ends] - _STILL_WINDOW_SECONDS + 1e-3, side="right") - 1
    differences = (track.thumbs_FHWC[end] - track.thumbs_FHWC[start] for start, end in zip(starts, ends, strict=True))
    return float(np.mean([np.abs(difference).mean() < _STILL_LEVELS for difference in differences]))


def cuts(track: Track) -> float:
    """Hard cuts, by the detector that filters clips."""
    found = hard_cuts(track.thumbs_FHWC, track.thumbs_FHWC, track.seconds)
    return float(sum(ratio >= _CUT_RATIO and levels >= _CUT_LEVELS for _, ratio, levels in found))


def similarity_at_lags(track: Track) -> np.ndarray:
    """Mean likeness (cosine) of frames so many frames apart, for lags 0, 1, ...

    Of tiny pictures less their own mean, so that a light going on and off does not count, and less the video's average,
    so that what stands still does not; with a noise floor, so that in a frozen video nothing is like anything.
    """
    pictures_FHWC = track.thumbs_FHWC - track.thumbs_FHWC.mean(axis=(1, 2), keepdims=True)
    pictures_FD = (pictures_FHWC - pictures_FHWC.mean(axis=0)).reshape(track.num_frames, -1)
    norms_F = np.sqrt((pictures_FD**2).sum(axis=1) + pictures_FD.shape[1] * _NOISE_LEVELS**2)
    pictures_FD = pictures_FD / norms_F[:, None]
    likeness_FF = pictures_FD @ pictures_FD.T
    return np.array([likeness_FF.diagonal(lag).mean() for lag in range(track.num_frames)])


def self_similarity(track: Track) -> float | None:
    """How far likeness rises again, at some lag of a second or more, after it had fallen: 0 never, about 1 to 2 a loop.

    Lags go up to 85 % of the length: beyond, too few pairs of frames are left.
    """
    lags = track.seconds - track.seconds[0]
    allowed = np.flatnonzero((lags >= _LEAST_LAG_SECONDS) & (lags <= (1 - END_SHARE) * lags[-1]))
    if not len(allowed):
        return None
    likeness = similarity_at_lags(track)
    rises = likeness - np.minimum.accumulate(likeness)
    return float(max(0.0, rises[allowed].max()))


def repeat_distance(track: Track, repeat_seconds: float) -> float | None:
    """RIFLEx's comparison with the opening, in our normalisation: 0 the opening again, about 1 anything else.

    Within a quarter of the expected moment, the frame nearest to the first one (root mean square over tiny pictures)
    begins a segment of a second, or what is left of it. Its mean distance to the opening of that length, frame by
    frame, is divided by the mean distance of the video's other frames to the opening's first frame.
    """
    seconds = track.seconds - track.seconds[0]
    low, high = (share * repeat_seconds for share in (1 - _REPEAT_SEARCH_SHARE, 1 + _REPEAT_SEARCH_SHARE))
    searched = np.flatnonzero((seconds >= low) & (seconds <= high))
    if not len(searched) or seconds[-1] < repeat_seconds:
        return None
    thumbs = track.thumbs_FHWC
    to_first_F = np.sqrt(((thumbs - thumbs[0]) ** 2).mean(axis=(1, 2, 3)))
    begin = int(searched[to_first_F[searched].argmin()])
    length = max(1, int(np.searchsorted(seconds, _REPEAT_SEGMENT_SECONDS)))
    segment = thumbs[begin : begin + length]
    distance = np.sqrt(((segment - thumbs[: len(segment)]) ** 2).mean(axis=(1, 2, 3))).mean()
    return float(distance / max(float(to_first_F[1:].mean()), _NOISE_LEVELS))


def no_repeat(track: Track, repeat_seconds: float) -> float | None:
    """1 if the video does not repeat its opening, 0 if it does; the mean over videos is RIFLEx's NoRepeat."""
    distance = repeat_distance(track, repeat_seconds)
    return None if distance is None else float(distance > _REPEAT_THRESHOLD)


def consistency(features_FD: np.ndarray) -> float | None:
    """VBench's consistency: each frame's cosine to the first and to the one before, negative ones as 0, their mean."""
    if len(features_FD) < 2:
        return None
    to_first = (features_FD[1:] @ features_FD[0]).clip(min=0)
    to_before = (features_FD[1:] * features_FD[:-1]).sum(axis=1).clip(min=0)
    return float((to_first + to_before).mean()) / 2


def _detail(
    name: str, titles: tuple[str, str, str], unit: str, source: str, values: Callable[[Track], np.ndarray]
) -> list[Measure]:
    """The mean of what each frame has of detail, and how much of it the video keeps.

    Args:
        titles: of the mean, the share kept and the slope.
    """
    title, title_kept, title_slope = titles[0], f"{titles[1]}, last over first 15 %", titles[2]
    per_second = "share of the mean a second"
    return [
        Measure(name, title, unit, Better.higher, source, lambda t: float(values(t).mean())),
        Measure(f"{name}_kept", title_kept, "share, 1 all", Better.higher, "FramePack", lambda t: kept(values(t))),
        Measure(f"{name}_slope", title_slope, per_second, Better.higher, "ours", lambda t: slope(values(t), t.seconds)),
    ]


def _drift(name: str, title: str, unit: str, values: Callable[[Track], np.ndarray]) -> Measure:
    return Measure(f"{name}_drift", f"drift of {title}", unit, Better.lower, "FramePack", lambda t: drift(values(t)))


def network_measures(with_clip: bool, with_dino: bool) -> list[Measure]:
    """Those of networks that the user names."""
    higher, cosine = Better.higher, "cosine, 0 to 1"
    clip = [
        Measure(
            "text_agreement",
            "agreement of frames with the prompt (CLIP)",
            "cosine, -1 to 1",
            higher,
            "VBench",
            lambda t: float(t.text_F.mean()) if len(t.text_F) else None,
        ),
        Measure(
            "background_consistency",
            "consistency of the whole picture (CLIP)",
            cosine,
            higher,
            "VBench",
            lambda t: consistency(t.clip_FD),
        ),
    ]
    dino = Measure(
        "subject_consistency",
        "consistency of the subject (DINO)",
        cosine,
        higher,
        "VBench",
        lambda t: consistency(t.dino_FD),
    )
    return [*(clip if with_clip else []), *([dino] if with_dino else [])]


def given_measures(program: str, better_by_name: Mapping[str, str]) -> list[Measure]:
    """Numbers that another program makes, as it gives them."""

    def measure(name: str, better: str) -> Measure:
        full = f"{program.lower()}_{name}"
        title = f"{program}: {name.replace('_', ' ')}"
        return Measure(full, title, "its own", Better(better), program, lambda t: t.given.get(full))

    return [measure(name, better) for name, better in better_by_name.items()]


def make_measures(repeat_seconds: float) -> list[Measure]:
    """Those that need no network, in the order of the report."""
    higher, lower, neither = Better.higher, Better.lower, Better.neither
    levels, share = "levels, 0 to 255", "share, 0 to 1"
    sharpness = ("sharpness", "sharpness kept", "slope of sharpness")
    high_band = ("energy in the high band", "high band kept", "slope of the high band")
    return [
        *_detail("sharpness", sharpness, "levels², 0 and above", "Pech-Pacheco 2000", lambda t: t.sharpness),
        *_detail("high_band", high_band, share, "ours", lambda t: t.high_band),
        Measure("flicker", "temporal flickering, 1 none", "0 to 1", higher, "VBench", flicker),
        Measure("luminance_jitter", "luminance going up and down", levels, lower, "ours", luminance_jitter),
        Measure("motion", "amount of motion", "diagonals a second, 0 and above", neither, "Farneback 2003", motion),
        Measure("smoothness", "smoothness of motion", "0 to 1", higher, "ours", smoothness),
        _drift("luminance", "luminance", levels, lambda t: t.luminance),
        _drift("saturation", "saturation", levels, lambda t: t.saturation),
        _drift("colour", "the mean colour", "ΔE of L*a*b*, 0 and above", lambda t: t.lab_F3),
        Measure(
            "content_drift", "drift of content", "0 same, 1 unrelated, 2 negative", neither, "FramePack", content_drift
        ),
        Measure("self_similarity", "self-similarity at a lag", "0 none to 2", lower, "ours", self_similarity),
        Measure(
            "repeat_distance",
            "distance from the opening where a repetition is expected",
            "0 same, about 1 other",
            higher,
            "RIFLEx",
            lambda t: repeat_distance(t, repeat_seconds),
        ),
        Measure("no_repeat", "NoRepeat", "share of videos", higher, "RIFLEx", lambda t: no_repeat(t, repeat_seconds)),
        Measure("still_share", "half seconds that stand still", share, lower, "filter_clips", still_share),
        Measure("cuts", "cuts inside the video", "number", lower, "filter_clips", cuts),
    ]


def measure_track(track: Track, measures: list[Measure]) -> dict[str, float | None]:
    """Every measure of a video; what is not finite is None."""
    values = {measure.name: measure.function(track) for measure in measures}
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
