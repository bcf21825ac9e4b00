"""Ways to spoil a video, one measure of evaluation each. Frames are uint8 RGB; F frames, H height, W width, C channel.

``strength`` 1 is plain to see, 0 leaves the video as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from exvideo_train.clips.decoders.pyav import iter_window
from exvideo_train.evaluation.reading import Reading, read_frames
from exvideo_train.evaluation.track import Track, track_video

LOOP_FRAMES = 24
# x264's constant rate factors: hardly a loss, and a loss that shows.
QUALITIES = {"good": "12", "poor": "26"}


def blurred(frames_FHWC: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """More and more."""
    sigmas = 0.1 + 0.05 * strength * np.arange(len(frames_FHWC))
    return np.stack([cv2.GaussianBlur(frame, (0, 0), s) for frame, s in zip(frames_FHWC, sigmas, strict=True)])


def frozen(frames_FHWC: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Two thirds of it stand still."""
    last = round((1 - strength * 2 / 3) * (len(frames_FHWC) - 1))
    return frames_FHWC[np.minimum(np.arange(len(frames_FHWC)), last)]


def looped(frames_FHWC: np.ndarray) -> np.ndarray:
    """The beginning again and again."""
    return frames_FHWC[np.arange(len(frames_FHWC)) % LOOP_FRAMES]


def flickering(frames_FHWC: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Every other frame brighter."""
    signs = np.where(np.arange(len(frames_FHWC)) % 2, 15, -15)[:, None, None, None] * strength
    return np.clip(frames_FHWC + signs, 0, 255).astype(np.uint8)


def drifting(frames_FHWC: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Towards orange."""
    shift = np.linspace(0, strength, len(frames_FHWC))[:, None, None, None] * np.array([60, 10, -40])
    return np.clip(frames_FHWC + shift, 0, 255).astype(np.uint8)


def cut(frames_FHWC: np.ndarray) -> np.ndarray:
    """To another picture in the middle: its own, upside down and with its colours inverted."""
    half = len(frames_FHWC) // 2
    return np.concatenate([frames_FHWC[:half], 255 - frames_FHWC[half:, ::-1]])


def jerky(frames_FHWC: np.ndarray) -> np.ndarray:
    """As far in the same time, but by leaps of every third frame."""
    return frames_FHWC[np.arange(len(frames_FHWC)) // 3 * 3]


SPOILT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sound": lambda frames: frames,
    **{make.__name__: make for make in (blurred, frozen, looped, flickering, drifting, cut, jerky)},
}
GRADED: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    make.__name__: make for make in (blurred, frozen, flickering, drifting)
}


def real_frames(path: Path, height: int, width: int) -> np.ndarray:
    """Every other frame of a video, reduced: frames_FHWC."""
    frames = iter_window(str(path), 0.0, math.inf, max(height, width), num_threads=1)
    kept = [frame for number, (_, frame) in enumerate(frames) if number % 2 == 0]
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in kept])


def track_of(path: Path) -> Track:
    """A video in numbers."""
    return track_video(read_frames(str(path), Reading(0.0, None, 2048)), 0.25)
