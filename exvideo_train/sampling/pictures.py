"""Pictures that videos begin with.

Axis letters: H height, W width, C channel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry


def read_picture(path: Path, geometry: Geometry) -> Tensor:
    """A picture cut at its centre and resized to the frames' size, uint8 RGB (H, W, C).

    Raises:
        UserError: it cannot be read, or is no picture.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as opened:
            picture = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (geometry.width, geometry.height))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image={path}: cannot be read as a picture ({error}); name a PNG or JPEG file") from error
    return torch.from_numpy(np.asarray(picture).copy())
