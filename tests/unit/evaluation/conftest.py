"""A made scene and a real clip, and both made to fail one measure each. F frames, H height, W width, C channel."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from support.spoilt import LOOP_FRAMES, QUALITIES, SPOILT, real_frames, track_of
from support.videos import make_video

from exvideo_train.evaluation.measures import make_measures, measure_track

HEIGHT, WIDTH, NUM_FRAMES, FPS = 64, 96, 49, 8
REPEAT_SECONDS = 3.0
REAL_SIZE, REAL_FPS = (96, 168), 12
Values = dict[tuple[str, str], dict[str, float | None]]


def scene(num_frames: int = NUM_FRAMES, seed: int = 0) -> np.ndarray:
    """A window that glides over a textured landscape, the same way all along: sharp, steady, nothing comes back."""
    random = np.random.default_rng(seed)
    wide = WIDTH + 2 * num_frames
    coarse = cv2.resize(random.uniform(60, 200, (6, wide // 12, 3)).astype(np.float32), (wide, HEIGHT))
    fine = cv2.resize(random.normal(0, 25, (HEIGHT // 2, wide // 2, 3)).astype(np.float32), (wide, HEIGHT))
    landscape = np.clip(coarse + fine, 0, 255).astype(np.uint8)
    return np.stack([landscape[:, 2 * index : 2 * index + WIDTH] for index in range(num_frames)])


@pytest.fixture(scope="session")
def values(tmp_path_factory: pytest.TempPathFactory) -> Values:
    """(video, quality of encoding) -> every measure."""
    return measured(scene(), FPS, REPEAT_SECONDS, tmp_path_factory.mktemp("spoilt"))


@pytest.fixture(scope="session")
def real_clip(clip_path: Path) -> np.ndarray:
    """Frames of the real clip, 66 of 5.3 seconds."""
    return real_frames(clip_path, *REAL_SIZE)


@pytest.fixture(scope="session")
def real_values(real_clip: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Values:
    """The same of the real clip."""
    return measured(real_clip, REAL_FPS, LOOP_FRAMES / REAL_FPS, tmp_path_factory.mktemp("real"))


def measured(frames_FHWC: np.ndarray, fps: int, repeat_seconds: float, folder: Path) -> Values:
    measures = make_measures(repeat_seconds)
    found = {}
    for name, spoil in SPOILT.items():
        for quality, crf in QUALITIES.items():
            path = make_video(folder / f"{name}-{quality}.mp4", spoil(frames_FHWC), fps=fps, options={"crf": crf})
            found[name, quality] = measure_track(track_of(path), measures)
    return found
