"""What a clip looks like, in numbers: cuts, motion, freezes, black, bars, and a hash that survives re-encoding.

Axis letters: F analysed frames, H height, W width, C channel.

Numbers are measured once and judged elsewhere, so that thresholds can be tried without decoding again. Nothing here
needs OpenCV, which on servers without a desktop does not load (libGL).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from exvideo_train.clips.decoders.pyav import iter_window
from exvideo_train.clips.decoders.timing import why_ended

# Analysed frames are this wide (or high): enough for cuts and bars, 40 kB each.
ANALYSIS_LONG_SIDE = 160
# Frames closer than this to the one before are skipped: 60 fps tells nothing that 30 does not.
_LEAST_STEP_SECONDS = 1 / 33
_CUT_WINDOW_SECONDS = 0.35
_DISSOLVE_WINDOWS_SECONDS = (0.4, 0.8, 1.4)
_DISSOLVE_LEAST_CHANGE = 12.0
# Pans over smooth textures go down to 0.09; dissolves between quiet shots and fades stay under 0.03. Those between
# moving shots lie among the pans: no threshold tells them apart, and they are not found.
_DISSOLVE_RESIDUAL = 0.06
_MOTION_STEP_SECONDS = 0.5
_FROZEN_CHANGE = 0.3
_BLACK_LEVEL = 16.0
_BAR_LEVEL = 14.0
_HASH_MOMENTS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class ClipMeasures:
    """Measures of the frames that training would use.

    Args:
        cut_strengths: for each candidate of a hard cut, (seconds from the span's start, how many times the change
            exceeds that of its neighbourhood, mean change in levels 0..255).
        num_dissolves: gradual transitions between quiet shots, fades, and lighting that changes just like them.
        motion: mean absolute change in grey levels over half a second.
        frozen_share: share of half seconds without any change.
        black_share: share of frames that are black.
        bars: shares of (top, bottom, left, right) of the picture that stay black throughout.
        hash_hex: 192-bit perceptual hash of three moments.
    """

    cut_strengths: list[tuple[float, float, float]]
    num_dissolves: int
    motion: float
    frozen_share: float
    black_share: float
    bars: tuple[float, float, float, float]
    hash_hex: str

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ClipMeasures:
        """From the fields as JSON has them, which knows no tuples."""
        return cls(**{**content, "bars": tuple(content["bars"])})

    def num_cuts(self, threshold: float, least_change: float) -> int:
        """Hard cuts and dissolves at these thresholds."""
        hard = sum(ratio >= threshold and change >= least_change for _, ratio, change in self.cut_strengths)
        return hard + self.num_dissolves


def measure_clip(video: str, start_seconds: float, end_seconds: float) -> ClipMeasures:
    """Decode a window once and measure it.

    Raises:
        UnreadableClip: it cannot be decoded.
    """
    moments: list[float] = []
    frames: list[np.ndarray] = []
    for moment, frame_HWC in iter_window(video, start_seconds, end_seconds, ANALYSIS_LONG_SIDE, num_threads=1):
        if not moments or moment - moments[-1] >= _LEAST_STEP_SECONDS:
            moments.append(moment)
            frames.append(frame_HWC)
    if not frames:
        raise why_ended(video, [start_seconds, end_seconds])
    return measure_frames(np.stack(frames), np.asarray(moments) - start_seconds)


def measure_frames(frames_FHWC: np.ndarray, moments: np.ndarray) -> ClipMeasures:
    """Measures of uint8 RGB frames shown from `moments` (seconds, ascending) on."""
    grey_FHW = _luma(frames_FHWC)
    blocks_FHWC = np.stack([_blocks(frame) for frame in frames_FHWC])
    motion, frozen_share = _motion(grey_FHW, moments)
    return ClipMeasures(
        cut_strengths=hard_cuts(frames_FHWC, blocks_FHWC, moments),
        num_dissolves=num_dissolves(blocks_FHWC, moments),
        motion=motion,
        frozen_share=frozen_share,
        black_share=float(np.mean(grey_FHW.mean(axis=(1, 2)) < _BLACK_LEVEL)),
        bars=_bars(grey_FHW),
        hash_hex=perceptual_hash(grey_FHW),
    )


def _luma(frames_FHWC: np.ndarray) -> np.ndarray:
    weights = np.array([0.2126, 0.7152, 0.0722], np.float32)
    return np.stack([frame @ weights for frame in frames_FHWC])


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(np.float32) - second).mean())


def _blocks(frame_HWC: np.ndarray) -> np.ndarray:
    """Averages of 8 x 8 blocks: noise, and motion within a block, no longer count."""
    height, width = (size // 8 * 8 for size in frame_HWC.shape[:2])
    blocks = frame_HWC[:height, :width].reshape(height // 8, 8, width // 8, 8, 3)
    return np.asarray(blocks.mean(axis=(1, 3), dtype=np.float32))


def hard_cuts(
    frames_FHWC: np.ndarray, blocks_FHWC: np.ndarray, moments: np.ndarray
) -> list[tuple[float, float, float]]:
    """Candidates for hard cuts as (seconds, ratio, change); a ratio under 1.5 is no candidate.

    A change counts by how far it exceeds most changes of its neighbourhood, as in PySceneDetect's adaptive detector.
    Taking a high quantile of a window in time, in place of the mean of four frames, stands animation drawn on every
    second or third frame; averaging blocks first stands fast motion of fine detail; and a flash, after which the
    picture is as before, is no cut.
    """
    changes = np.array([_difference(first, second) for first, second in pairwise(blocks_FHWC)])
    found = []
    for index, change in enumerate(changes):
        moment = moments[index + 1]
        near = np.abs(moments[1:] - moment) <= _CUT_WINDOW_SECONDS
        near[index] = False
        usual = float(np.quantile(changes[near], 0.85)) if near.any() else 0.0
        ratio = min(float(change) / (usual + 1.0), 255.0)
        if ratio < 1.5:
            continue
        before, after = blocks_FHWC[max(0, index - 2)], blocks_FHWC[min(len(blocks_FHWC) - 1, index + 4)]
        if _difference(before, after) < 0.5 * change:
            continue
        full_change = _difference(frames_FHWC[index], frames_FHWC[index + 1])
        found.append((round(float(moment), 3), round(ratio, 2), round(full_change, 2)))
    return found


def num_dissolves(blocks_FHWC: np.ndarray, moments: np.ndarray) -> int:
    """Gradual transitions between quiet shots, and fades: stretches whose middle is the average of their ends."""
    marks: list[float] = []
    for window in _DISSOLVE_WINDOWS_SECONDS:
        for centre in np.arange(moments[0] + window / 2, moments[-1] - window / 2, window / 8):
            times = centre + window * np.array([-0.5, -0.25, 0.0, 0.25, 0.5])
            first, early, middle, late, last = blocks_FHWC[np.searchsorted(moments, times - 1e-6)]
            whole = np.abs(first - last).mean()
            if whole < _DISSOLVE_LEAST_CHANGE:
                continue
            average = (first + last) / 2
            # Half the change must have happened between the quarters, or a hard cut beside a still would pass.
            if (
                np.abs(middle - average).mean() < _DISSOLVE_RESIDUAL * whole
                and np.abs((early + late) / 2 - average).mean() < _DISSOLVE_RESIDUAL * whole
            ):
                marks.append(float(centre))
    marks.sort()
    return sum(index == 0 or mark - marks[index - 1] > 0.5 for index, mark in enumerate(marks))


def _motion(grey_FHW: np.ndarray, moments: np.ndarray) -> tuple[float, float]:
    """Mean change over half seconds, and the share of them without any."""
    starts = np.arange(moments[0], moments[-1] - _MOTION_STEP_SECONDS + 1e-6, _MOTION_STEP_SECONDS / 2)
    if not len(starts):
        return 0.0, 1.0
    firsts = np.searchsorted(moments, starts + 1e-3, side="right") - 1
    lasts = np.searchsorted(moments, starts + _MOTION_STEP_SECONDS + 1e-3, side="right") - 1
    values = np.array(
        [np.abs(grey_FHW[first] - grey_FHW[last]).mean() for first, last in zip(firsts, lasts, strict=True)]
    )
    return float(values.mean()), float(np.mean(values < _FROZEN_CHANGE))


def _bars(grey_FHW: np.ndarray) -> tuple[float, float, float, float]:
    """Shares of the picture at the top, bottom, left and right that are never brighter than black."""
    height, width = grey_FHW.shape[1:]
    # A percentile forgives single bright pixels: compression noise and the edge of the picture.
    rows = np.quantile(grey_FHW, 0.98, axis=2).max(axis=0) > _BAR_LEVEL
    columns = np.quantile(grey_FHW, 0.98, axis=1).max(axis=0) > _BAR_LEVEL
    if not rows.any() or not columns.any():
        return 1.0, 0.0, 0.0, 0.0
    top, bottom = int(rows.argmax()), int(rows[::-1].argmax())
    left, right = int(columns.argmax()), int(columns[::-1].argmax())
    return top / height, bottom / height, left / width, right / width


def bars_in_crop(bars: tuple[float, float, float, float], picture_aspect: float, target_aspect: float) -> float:
    """Share of the centre crop's area that black bars take."""
    top, bottom, left, right = bars
    crop_height = min(1.0, picture_aspect / target_aspect)
    crop_width = min(1.0, target_aspect / picture_aspect)
    margin_y, margin_x = (1 - crop_height) / 2, (1 - crop_width) / 2
    height = min(1 - bottom, 1 - margin_y) - max(top, margin_y)
    width = min(1 - right, 1 - margin_x) - max(left, margin_x)
    return 1.0 - max(0.0, height) * max(0.0, width) / (crop_height * crop_width)


def perceptual_hash(grey_FHW: np.ndarray) -> str:
    """Signs of the low frequencies of three moments: 3 x 64 bits as hex; alike for re-encoded and resized copies."""
    bits = []
    for moment in _HASH_MOMENTS:
        small = _shrink(grey_FHW[round(moment * (len(grey_FHW) - 1))], 32)
        low = (_DCT @ small @ _DCT.T)[:8, 1:9]
        bits.append(low > np.median(low))
    return np.packbits(np.concatenate([bit.ravel() for bit in bits])).tobytes().hex()


def _shrink(grey_HW: np.ndarray, size: int) -> np.ndarray:
    """Area average to size x size."""
    for axis in (0, 1):
        edges = np.linspace(0, grey_HW.shape[axis], size + 1)
        sums = np.concatenate(
            [np.zeros_like(np.take(grey_HW, [0], axis)), np.cumsum(grey_HW, axis, dtype=np.float64)], axis
        )
        whole = np.minimum(edges.astype(int), grey_HW.shape[axis] - 1)
        part = (edges - whole).reshape((-1, 1) if axis == 0 else (1, -1))
        at_edges = np.take(sums, whole, axis) * (1 - part) + np.take(sums, whole + 1, axis) * part
        grey_HW = np.diff(at_edges, axis=axis) * size / grey_HW.shape[axis]
    return grey_HW


_DCT: np.ndarray = np.cos(np.pi * (2 * np.arange(32) + 1) * np.arange(32)[:, None] / 64)
