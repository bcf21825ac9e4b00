"""One moving scene, and the same scene made to fail one measure each. F frames, H height, W width, C channel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.videos import make_video

from exvideo_train.evaluation.measures import make_measures, measure_track
from exvideo_train.evaluation.reading import Reading, read_frames
from exvideo_train.evaluation.track import Track, track_video

HEIGHT, WIDTH, NUM_FRAMES, FPS = 64, 96, 49, 8
REPEAT_SECONDS = 3.0


def scene(num_frames: int = NUM_FRAMES, seed: int = 0) -> np.ndarray:
    """A window that glides over a textured landscape, the same way all along: sharp, steady, nothing comes back."""
    random = np.random.default_rng(seed)
    wide = WIDTH + 2 * num_frames
    coarse = cv2.resize(random.uniform(60, 200, (6, wide // 12, 3)).astype(np.float32), (wide, HEIGHT))
    fine = cv2.resize(random.normal(0, 25, (HEIGHT // 2, wide // 2, 3)).astype(np.float32), (wide, HEIGHT))
    landscape = np.clip(coarse + fine, 0, 255).astype(np.uint8)
    return np.stack([landscape[:, 2 * index : 2 * index + WIDTH] for index in range(num_frames)])


def blurred(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 0.1 + 0.05 * index) for index, frame in enumerate(frames)])


def frozen(frames: np.ndarray) -> np.ndarray:
    return frames[np.minimum(np.arange(len(frames)), len(frames) // 3)]


def looped(frames: np.ndarray) -> np.ndarray:
    return frames[np.arange(len(frames)) % 24]


def flickering(frames: np.ndarray) -> np.ndarray:
    signs = np.where(np.arange(len(frames)) % 2, 15, -15)[:, None, None, None]
    return np.clip(frames.astype(int) + signs, 0, 255).astype(np.uint8)


def drifting(frames: np.ndarray) -> np.ndarray:
    shift = np.linspace(0, 1, len(frames))[:, None, None, None] * np.array([60, 10, -40])
    return np.clip(frames + shift, 0, 255).astype(np.uint8)


def cut(frames: np.ndarray) -> np.ndarray:
    other = 255 - scene(len(frames), seed=9)
    return np.concatenate([frames[: len(frames) // 2], other[len(frames) // 2 :]])


def jerky(frames: np.ndarray) -> np.ndarray:
    """As far in the same time, but by leaps of every third frame."""
    return frames[np.arange(len(frames)) // 3 * 3]


SPOILT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sound": lambda frames: frames,
    **{make.__name__: make for make in (blurred, frozen, looped, flickering, drifting, cut, jerky)},
}
QUALITIES = {"good": "12", "poor": "26"}


def track_of(path: Path) -> Track:
    return track_video(read_frames(str(path), Reading(0.0, None, 2048)), 0.25)


@pytest.fixture(scope="session")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, float | None]]:
    """(video, quality of encoding) -> every measure."""
    folder = tmp_path_factory.mktemp("spoilt")
    measures = make_measures(REPEAT_SECONDS)
    return {
        (name, quality): measure_track(
            track_of(make_video(folder / f"{name}-{quality}.mp4", spoil(scene()), fps=FPS, options={"crf": crf})),
            measures,
        )
        for name, spoil in SPOILT.items()
        for quality, crf in QUALITIES.items()
    }
