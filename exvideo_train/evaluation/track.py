"""What one pass over a video keeps of it: a few numbers a frame, a tiny picture of each, and some to show.

Axis letters: F frames, H height, W width, C colour channel. Frames are uint8 RGB.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
from PIL import Image

from exvideo_train.evaluation.frames import (
    FLOW_LONG_SIDE,
    flow_of,
    flow_roughness,
    high_band_share,
    mean_change,
    shrunk,
    variance_of_laplacian,
)

THUMB_LONG_SIDE = 32
_SHOWN_LONG_SIDE = 240
_MOST_SHOWN = 16


@dataclass(frozen=True)
class Track:
    """A video in numbers; arrays have one entry a frame, NaN where a frame has none (the first has no neighbour).

    Attributes:
        seconds: moment from which each frame is shown.
        height, width: of the frames measured.
        sharpness: variance of the Laplacian, grey levels squared.
        high_band: share of the energy above the band's frequency, 0..1.
        luminance: mean of grey, 0..255.
        saturation: mean of HSV's S, 0..255.
        lab_F3: mean colour as L* 0..100, a*, b*.
        change: mean absolute difference from the frame before, levels 0..255.
        motion: mean length of the optical flow from the frame before, share of the picture's diagonal a second.
        roughness: how much of the flow changes from one pair of frames to the next, 0..1.
        thumbs_FHWC: float32 averages of blocks, levels 0..255.
        shown: (seconds, JPEG) of some frames, spread evenly, the first and the last among them.
        clip_FD, dino_FD: unit vectors of what CLIP and DINO see; (0, 0) where they were not asked.
        text_F: cosine of each of CLIP's vectors to that of the prompt; (0,) where there is none.
        given: numbers that another program made of the whole file, by the measure's name.
    """

    seconds: np.ndarray
    height: int
    width: int
    sharpness: np.ndarray
    high_band: np.ndarray
    luminance: np.ndarray
    saturation: np.ndarray
    lab_F3: np.ndarray
    change: np.ndarray
    motion: np.ndarray
    roughness: np.ndarray
    thumbs_FHWC: np.ndarray
    shown: tuple[tuple[float, bytes], ...]
    clip_FD: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    dino_FD: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    text_F: np.ndarray = field(default_factory=lambda: np.empty(0))
    given: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_frames(self) -> int:
        return len(self.seconds)

    @property
    def fps(self) -> float:
        """Mean rate; 0 of a single frame."""
        span = float(self.seconds[-1] - self.seconds[0])
        return (self.num_frames - 1) / span if span > 0 else 0.0

    def first(self, num_frames: int) -> Track:
        """The beginning alone."""
        cut: dict[str, Any] = {
            name: value[:num_frames] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        last = self.seconds[num_frames - 1]
        return replace(self, **cut, shown=tuple(frame for frame in self.shown if frame[0] <= last))


SERIES = ("sharpness", "high_band", "luminance", "saturation", "change", "motion")
"""The arrays that are worth a curve."""


def track_video(frames: Iterable[tuple[float, np.ndarray]], high_band: float) -> Track:
    """One pass; of the frames themselves only the last and its flow are held."""
    rows: list[tuple[float, ...]] = []
    thumbs: list[np.ndarray] = []
    shown = _Shown()
    before_HWC: np.ndarray | None = None
    small_before: np.ndarray | None = None
    flow_before: np.ndarray | None = None
    for seconds, frame_HWC in frames:
        grey_HW = cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY)
        small = shrunk(grey_HW, FLOW_LONG_SIDE)
        motion = roughness = change = np.nan
        if before_HWC is not None and small_before is not None:
            change = mean_change(before_HWC, frame_HWC)
            flow_HW2 = flow_of(small_before, small)
            step = seconds - rows[-1][0]
            length = float(np.linalg.norm(flow_HW2, axis=2).mean())
            motion = length / float(np.hypot(*small.shape)) / step if step > 0 else 0.0
            if flow_before is not None:
                roughness = flow_roughness(flow_before, flow_HW2)
            flow_before = flow_HW2
        thumb_HWC = shrunk(frame_HWC.astype(np.float32), THUMB_LONG_SIDE)
        # Float32 RGB in 0..1 is what OpenCV makes true L*a*b* of.
        lab = cv2.cvtColor(thumb_HWC / 255, cv2.COLOR_RGB2LAB).mean(axis=(0, 1))
        saturation = float(cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2HSV)[..., 1].mean())
        rows.append(
            (
                seconds,
                variance_of_laplacian(grey_HW),
                high_band_share(grey_HW, high_band),
                float(grey_HW.mean()),
                saturation,
                *map(float, lab),
                change,
                motion,
                roughness,
            )
        )
        thumbs.append(thumb_HWC)
        shown.see(seconds, frame_HWC)
        before_HWC, small_before = frame_HWC, small
    assert before_HWC is not None
    columns = np.asarray(rows, np.float64).T
    return Track(
        seconds=columns[0],
        height=before_HWC.shape[0],
        width=before_HWC.shape[1],
        sharpness=columns[1],
        high_band=columns[2],
        luminance=columns[3],
        saturation=columns[4],
        lab_F3=columns[5:8].T,
        change=columns[8],
        motion=columns[9],
        roughness=columns[10],
        thumbs_FHWC=np.stack(thumbs),
        shown=shown.frames(),
    )


class _Shown:
    """Evenly spread frames of a video whose length is not known before its end: every n-th, n doubling."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, bytes]] = []
        self._last: Callable[[], tuple[float, bytes]] | None = None
        self._stride, self._num_seen = 1, 0

    def see(self, seconds: float, frame_HWC: np.ndarray) -> None:
        def jpeg() -> tuple[float, bytes]:
            content = io.BytesIO()
            Image.fromarray(shrunk(frame_HWC, _SHOWN_LONG_SIDE)).save(content, "JPEG", quality=85)
            return seconds, content.getvalue()

        self._last = jpeg
        if self._num_seen % self._stride == 0:
            self._kept.append(jpeg())
            if len(self._kept) > _MOST_SHOWN:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._num_seen += 1

    def frames(self) -> tuple[tuple[float, bytes], ...]:
        assert self._last is not None
        last = self._last()
        return tuple(self._kept if self._kept[-1][0] == last[0] else [*self._kept, last])
