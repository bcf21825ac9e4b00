"""The middle of a picture, cut to a target's aspect and resized to its size.

The crop comes before the resize: the same picture for fewer pixels of work.
Axis letters: H height, W width, C channel.
"""

from __future__ import annotations

import numpy as np


def crop_size(frame_height: int, frame_width: int, height: int, width: int, pixel_aspect: float) -> tuple[int, int]:
    """Largest height and width inside a frame that have the target's aspect in square pixels.

    Args:
        frame_height, frame_width: of the frame, in its own pixels.
        height, width: of the target.
        pixel_aspect: width of the frame's pixels over their height.
    """
    target = width / height / pixel_aspect
    if frame_width > frame_height * target:
        return frame_height, min(frame_width, max(2, round(frame_height * target)))
    return min(frame_height, max(2, round(frame_width / target))), frame_width


def crop_and_resize(frame_HWC: np.ndarray, height: int, width: int, pixel_aspect: float) -> np.ndarray:
    """The frame's middle, uint8 (H, W, C) of the target's size, by antialiased bicubic on one thread."""
    import torch
    import torch.nn.functional as F

    frame_height, frame_width = frame_HWC.shape[:2]
    crop_height, crop_width = crop_size(frame_height, frame_width, height, width, pixel_aspect)
    top, left = (frame_height - crop_height) // 2, (frame_width - crop_width) // 2
    cropped_HWC = frame_HWC[top : top + crop_height, left : left + crop_width]
    if (crop_height, crop_width) == (height, width):
        return cropped_HWC
    # A whole batch with channels last, copied by numpy: torch has fast code for bytes in this order alone, and its
    # own copying would wake a thread a core for each frame.
    batch = torch.from_numpy(np.ascontiguousarray(cropped_HWC[None])).permute(0, 3, 1, 2)
    resized = F.interpolate(batch, (height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).numpy()[0]
