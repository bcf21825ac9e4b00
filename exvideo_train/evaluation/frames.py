"""Measures of one frame, or of one and its neighbour.

Axis letters: H height, W width, C colour channel.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import scipy.fft

# Farneback's cost grows with the pixels, and its reach is some 20 of them: small pictures see large motion.
FLOW_LONG_SIDE = 192
# Flow shorter than this is noise of the estimate, in pixels of the small picture.
_STILL_PIXELS = 0.1


def shrunk(frame: np.ndarray, long_side: int) -> np.ndarray:
    """Averaged down so that the longer side has at most so many pixels; never enlarged."""
    height, width = frame.shape[:2]
    scale = min(1.0, long_side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA))


def variance_of_laplacian(grey_HW: np.ndarray) -> float:
    """Sharpness: variance of the 3 x 3 Laplacian, grey levels squared, 0 and above.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000). Counts noise as detail.
    """
    return float(cv2.Laplacian(grey_HW, cv2.CV_32F).var())


def high_band_share(grey_HW: np.ndarray, cycles_a_pixel: float) -> float:
    """Share of the picture's energy, its mean aside, above a spatial frequency: 0..1.

    A Hann window keeps the picture's edges from counting as detail. Does not change with contrast or brightness.
    """
    grey = grey_HW.astype(np.float32) - np.float32(grey_HW.mean())
    window_HW, above_HW, weights_W = _spectrum(*grey.shape, cycles_a_pixel)
    energy_HW = np.abs(scipy.fft.rfft2(grey * window_HW)) ** 2 * weights_W
    total = float(energy_HW.sum())
    # An even picture has rounding alone, which is spread over all frequencies.
    return float(energy_HW[above_HW].sum()) / total if total > 1e-3 * grey.size else 0.0


@lru_cache(maxsize=4)
def _spectrum(height: int, width: int, cycles_a_pixel: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    window_HW = np.outer(np.hanning(height), np.hanning(width)).astype(np.float32)
    frequency_HW = np.hypot(scipy.fft.fftfreq(height)[:, None], scipy.fft.rfftfreq(width)[None, :])
    # A real transform leaves out the mirror of all columns but the first and, of an even width, the last.
    weights_W = np.full(frequency_HW.shape[1], 2.0, np.float32)
    weights_W[0] = 1.0
    if width % 2 == 0:
        weights_W[-1] = 1.0
    return window_HW, frequency_HW > cycles_a_pixel, weights_W


def mean_change(before_HWC: np.ndarray, frame_HWC: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames, levels 0..255: what VBench's temporal_flickering is made of."""
    return float(np.mean(cv2.absdiff(before_HWC, frame_HWC)))


def flow_of(before_HW: np.ndarray, grey_HW: np.ndarray) -> np.ndarray:
    """Optical flow (H, W, 2) in pixels, by Farneback's polynomial expansion with OpenCV's usual settings."""
    return np.asarray(
        cv2.calcOpticalFlowFarneback(
            before_HW,
            grey_HW,
            None,  # type: ignore[call-overload]
            pyr_scale=0.5,
            levels=3,
            winsize=15,
            iterations=3,
            poly_n=5,
            poly_sigma=1.2,
            flags=0,
        )
    )


def flow_roughness(before_HW2: np.ndarray, flow_HW2: np.ndarray) -> float:
    """How much of the motion changes between two pairs of frames: 0 steady, 1 turned round or begun anew."""
    change = float(np.linalg.norm(flow_HW2 - before_HW2, axis=2).mean())
    whole = float((np.linalg.norm(flow_HW2, axis=2) + np.linalg.norm(before_HW2, axis=2)).mean())
    return change / max(whole, 2 * _STILL_PIXELS) if change < max(whole, 2 * _STILL_PIXELS) else 1.0
