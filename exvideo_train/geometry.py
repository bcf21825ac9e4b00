"""The size of a training sample in pixels and in latents.

Axis letters: F video frames, T latent frames, H height, W width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from exvideo_train.errors import UserError

# CogVideoX's 3D VAE: the first frame alone, then 4 frames a latent; 8x8 pixels a latent (vae/config.json).
TEMPORAL_COMPRESSION = 4
SPATIAL_COMPRESSION = 8
# The VAE encodes in chunks of 8 frames (the first of 9) with a causal cache; other lengths give poor latents.
FRAME_CHUNK = 8
# 8 pixels a latent times the DiT's 2x2 patches.
PIXELS_PER_PATCH = 16
# Beyond what any model makes, and small enough that nothing computed of them overflows.
MOST_FRAMES, MOST_PIXELS, MOST_FPS = 99_993, 16_384, 1000.0


@dataclass(frozen=True)
class Geometry:
    """Frames, size and rate of one training sample.

    Args:
        num_frames: video frames, 8k+1.
        height, width: pixels, multiples of 16.
        fps: frames a second at which clips are sampled.

    Raises:
        UserError: a value that the VAE or the patch size cannot take.
    """

    num_frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        if self.num_frames > MOST_FRAMES:
            raise UserError(f"num_frames={self.num_frames}: at most {MOST_FRAMES}; exp=129f has 129")
        if self.num_frames < 1 or self.num_frames % FRAME_CHUNK != 1:
            lower = max(1, (self.num_frames - 1) // FRAME_CHUNK * FRAME_CHUNK + 1)
            raise UserError(
                f"num_frames={self.num_frames}: the VAE needs 8k+1 frames; "
                f"use num_frames={lower} or num_frames={lower + FRAME_CHUNK}"
            )
        for field in ("height", "width"):
            pixels = getattr(self, field)
            if pixels > MOST_PIXELS:
                raise UserError(f"{field}={pixels}: at most {MOST_PIXELS}; exp=129f has 480x720")
            if pixels < PIXELS_PER_PATCH or pixels % PIXELS_PER_PATCH:
                lower = max(PIXELS_PER_PATCH, pixels // PIXELS_PER_PATCH * PIXELS_PER_PATCH)
                raise UserError(
                    f"{field}={pixels}: must be a positive multiple of 16 (8 pixels a latent, 2 latents a patch); "
                    f"use {field}={lower} or {field}={lower + PIXELS_PER_PATCH}"
                )
        if not 0 < self.fps <= MOST_FPS:
            raise UserError(f"fps={self.fps}: must be positive, at most {MOST_FPS:g}; CogVideoX is trained at fps=8")

    @property
    def num_latent_frames(self) -> int:
        return 1 + (self.num_frames - 1) // TEMPORAL_COMPRESSION

    @property
    def latent_height(self) -> int:
        return self.height // SPATIAL_COMPRESSION

    @property
    def latent_width(self) -> int:
        return self.width // SPATIAL_COMPRESSION

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
            UserError: the name has another form, or names a geometry that the model cannot take.
        """
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})_(\d{1,6}(?:\.\d{1,6})?)fps", name)
        if match is None:
            raise UserError(f"geometry {name!r}: write frames x height x width and rate, like 49x480x720_8fps")
        frames, height, width = (int(number) for number in match.groups()[:3])
        return cls(frames, height, width, float(match[4]))
