"""Videos made for a test, with a clock drawn into every frame."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from exvideo_train.clips.record import ClipRecord, make_clip_id

# The frame's number as 12 bits, in a grid of 4 x 3 bright and dark blocks that fills the picture.
COLUMNS, ROWS = 4, 3
DARK, BRIGHT = 50, 200


def draw_number(number: int, height: int, width: int) -> np.ndarray:
    """An upright RGB picture (H, W, C) that shows a number below 4096."""
    picture = np.empty((height, width, 3), np.uint8)
    rows = np.arange(height) * ROWS // height
    columns = np.arange(width) * COLUMNS // width
    bits = (number >> (rows[:, None] * COLUMNS + columns[None, :])) & 1
    picture[:] = np.where(bits, BRIGHT, DARK)[..., None]
    return picture


def read_number(frame_HWC: np.ndarray) -> int:
    """The number that an upright frame shows, whatever its size."""
    height, width = frame_HWC.shape[:2]
    number = 0
    for bit in range(ROWS * COLUMNS):
        y, x = ((bit // COLUMNS + 0.5) / ROWS, (bit % COLUMNS + 0.5) / COLUMNS)
        middle = frame_HWC[int((y - 0.08) * height) : int((y + 0.08) * height)]
        block = middle[:, int((x - 0.06) * width) : int((x + 0.06) * width)]
        number |= int(block.mean() > (DARK + BRIGHT) / 2) << bit
    return number


def read_numbers(frames_FHWC: torch.Tensor) -> list[int]:
    """The number that each upright frame shows."""
    return [read_number(frame) for frame in frames_FHWC.numpy()]


def shown_at(times: list[float], moments: list[float]) -> list[int]:
    """Index of the frame that a player shows: the last that has begun."""
    return [bisect.bisect_right(times, moment + 1e-6) - 1 for moment in moments]


def make_video(
    path: Path,
    frames: Sequence[np.ndarray] | int = 150,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    size: tuple[int, int] = (96, 128),
    fps: Fraction | int = 25,
    milliseconds: Sequence[int] | None = None,
    turn: int = 0,
    pixel_aspect: Fraction | None = None,
    sound: bool = False,
    gop: int = 25,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video of given frames, or of that many that show their own numbers.

    `milliseconds` gives each frame its own time; `turn` stores the picture on its side with rotation metadata of so
    many degrees counter-clockwise.
    """
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV has no {codec} encoder")
    height, width = size
    if isinstance(frames, int):
        frames = [draw_number(number, height, width) for number in range(frames)]
    quiet = {"libx265": {"x265-params": "log-level=0"}, "libsvtav1": {"preset": "9", "crf": "20"}}
    fast = {"libx264": {"preset": "veryfast"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}
    time_base = Fraction(1, 1000) if milliseconds is not None else 1 / Fraction(fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=Fraction(fps), options={**quiet.get(codec, {}), **fast.get(codec, {}), **(options or {})}
        )
        stored = [np.rot90(frame, -turn // 90) for frame in frames]
        stream.height, stream.width = stored[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = time_base
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if turn:
            stream.set_display_rotation(turn)
        voice = container.add_stream("aac", rate=44100, layout="mono") if sound else None
        for number, picture in enumerate(stored):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=pixel_format)
            frame.pts = milliseconds[number] if milliseconds is not None else number
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if voice is not None:
            tone = (0.1 * np.sin(np.arange(44100 * 2) / 30)).astype(np.float32)[None]
            sound_frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            sound_frame.sample_rate = 44100
            sound_frame.pts = 0
            container.mux(voice.encode(sound_frame))
            container.mux(voice.encode(None))
    return path


def clip_of(
    video: Path | str, start: float = 0.0, end: float | None = None, caption: str = "a test clip"
) -> ClipRecord:
    """A record of a video's span."""
    return ClipRecord(make_clip_id("test", str(video), start, end), "test", str(video), start, end, caption)
