"""How a model's latents and patches lie over a video, and which videos it can take.

Axis letters: T latent frames, H and W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry


@dataclass(frozen=True)
class LatentGrid:
    """A model's grid; its first latent frame holds the first video frame alone.

    Args:
        frame_step: frames come as ``k * frame_step + 1``.
        min_frames: least number of frames.
        frames_per_latent: video frames of each later latent frame.
        pixels_per_latent: rows and columns of a latent.
        pixels_per_patch: rows and columns of one token; height and width are multiples of it.
    """

    frame_step: int
    min_frames: int
    frames_per_latent: int
    pixels_per_latent: int
    pixels_per_patch: int

    def check(self, geometry: Geometry) -> None:
        """Raises UserError, with the nearest values, for a geometry that the model cannot take."""
        if geometry.num_frames < self.min_frames or (geometry.num_frames - 1) % self.frame_step:
            lower = max(self.min_frames, (geometry.num_frames - 1) // self.frame_step * self.frame_step + 1)
            form = f"{self.frame_step}k+1 frames" if self.frame_step > 1 else f"{self.min_frames} frames or more"
            raise UserError(
                f"num_frames={geometry.num_frames}: the VAE needs {form}; "
                f"use num_frames={lower} or num_frames={lower + self.frame_step}"
            )
        step = self.pixels_per_patch
        for field in ("height", "width"):
            pixels = getattr(geometry, field)
            if pixels % step:
                lower = max(step, pixels // step * step)
                raise UserError(
                    f"{field}={pixels}: must be a positive multiple of {step} ({self.pixels_per_latent} pixels a "
                    f"latent, {step // self.pixels_per_latent} latents a patch); use {field}={lower} or "
                    f"{field}={lower + step}"
                )

    def shape_THW(self, geometry: Geometry) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a sample."""
        return (
            1 + (geometry.num_frames - 1) // self.frames_per_latent,
            geometry.height // self.pixels_per_latent,
            geometry.width // self.pixels_per_latent,
        )

    def num_tokens(self, geometry: Geometry) -> int:
        """Patches of a sample, over all latent frames."""
        rows, columns = geometry.height // self.pixels_per_patch, geometry.width // self.pixels_per_patch
        return self.shape_THW(geometry)[0] * rows * columns
