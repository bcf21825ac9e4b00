"""The size of a training sample in video frames and pixels; which sizes a model takes, its latent grid knows."""

from __future__ import annotations

import re
from dataclasses import dataclass

from exvideo_train.errors import UserError

# Beyond what any model makes, and small enough that nothing computed of them overflows.
MOST_FRAMES, MOST_PIXELS, MOST_FPS = 99_993, 16_384, 1000.0


@dataclass(frozen=True)
class Geometry:
    """Frames, size and rate of one training sample.

    Args:
        num_frames: video frames.
        height, width: pixels.
        fps: frames a second at which clips are sampled.

    Raises:
        UserError: a value that no model takes.
    """

    num_frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        for name, most in (("num_frames", MOST_FRAMES), ("height", MOST_PIXELS), ("width", MOST_PIXELS)):
            if not 1 <= (number := getattr(self, name)) <= most:
                raise UserError(f"{name}={number}: must be from 1 to {most}; exp=129f has 129 frames of 480x720")
        if not 0 < self.fps <= MOST_FPS:
            raise UserError(f"fps={self.fps}: must be positive, at most {MOST_FPS:g}; CogVideoX is trained at fps=8")

    @property
    def duration_seconds(self) -> float:
        """Time from the first frame's moment to the last one's."""
        return (self.num_frames - 1) / self.fps

    @property
    def name(self) -> str:
        """Name of the geometry's folder in a latent store, e.g. ``129x480x720_8fps``."""
        return f"{self.num_frames}x{self.height}x{self.width}_{self.fps:g}fps"

    @classmethod
    def from_name(cls, name: str) -> Geometry:
        """The inverse of :attr:`name`.

        Raises:
            UserError: the name has another form, or names a geometry that no model takes.
        """
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})_(\d{1,6}(?:\.\d{1,6})?)fps", name)
        if match is None:
            raise UserError(f"geometry {name!r}: write frames x height x width and rate, like 49x480x720_8fps")
        frames, height, width = (int(number) for number in match.groups()[:3])
        return cls(frames, height, width, float(match[4]))
