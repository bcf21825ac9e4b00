"""A whole video frame by frame, however long: no more than one frame and the decoder's own are held.

Axis letters: H height, W width, C colour channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exvideo_train.clips.container import Reason, UnreadableClip, VideoInfo, probe_video
from exvideo_train.clips.decoders.pyav import iter_frames, iter_window

# Frames are taken in their middle: at their edge, rounding of timestamps decides.
_MIDDLE = 0.5
# Headers round, and some count the sound.
_LEAST_LOSS_SECONDS, _LEAST_LOSS_FRAMES = 0.5, 2.5


@dataclass(frozen=True)
class Reading:
    """How videos are read.

    Attributes:
        fps: frames a second, 0 for every frame as it comes.
        size: (height, width) to which frames are cut at their centre and resized, None for their own size. Given only
            together with fps.
        max_frames: longer videos are refused.
    """

    fps: float
    size: tuple[int, int] | None
    max_frames: int


def read_frames(video: str, reading: Reading) -> Iterator[tuple[float, np.ndarray]]:
    """Yields (seconds from the first frame, uint8 RGB frame of shape (H, W, C)).

    Raises:
        UnreadableClip: it cannot be opened or decoded, or is too long; the message names the file.
    """
    info = probe_video(video)
    frames = (
        _resampled(video, info, reading)
        if reading.fps
        else iter_window(video, 0.0, math.inf, max(info.height, info.width), num_threads=1)
    )
    seconds = 0.0
    for index, (seconds, frame_HWC) in enumerate(frames):
        if index == reading.max_frames:
            raise UnreadableClip(Reason.TOO_LARGE, f"{video} has more than max_frames={reading.max_frames} frames")
        yield seconds, frame_HWC
    # FFmpeg ends a file that was cut off as if it were whole.
    promised = info.duration_seconds or 0.0
    if promised - seconds > max(_LEAST_LOSS_SECONDS, _LEAST_LOSS_FRAMES / info.fps if info.fps else 0.0):
        raise UnreadableClip(
            Reason.TRUNCATED, f"{video} ends after {seconds:.2f} s, its header promises {promised:.2f} s"
        )


def _resampled(video: str, info: VideoInfo, reading: Reading) -> Iterator[tuple[float, np.ndarray]]:
    if info.duration_seconds is None:
        raise UnreadableClip(Reason.BAD_TIMESTAMPS, f"{video} does not say how long it is; read it at fps=0")
    num_frames = math.floor(info.duration_seconds * reading.fps + 1e-6)
    if num_frames > reading.max_frames:
        raise UnreadableClip(
            Reason.TOO_LARGE, f"{video} has {num_frames} frames at fps={reading.fps:g}, max_frames={reading.max_frames}"
        )
    moments = [(index + _MIDDLE) / reading.fps for index in range(num_frames)]
    height, width = reading.size or (info.height, info.width)
    for index, frame_HWC in iter_frames(video, moments, height, width, num_threads=1):
        yield index / reading.fps, frame_HWC
