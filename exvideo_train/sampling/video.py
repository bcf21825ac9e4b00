"""Frames to files that a person looks at: mp4 and contact sheet.

Axis letters: F video frames, H height, W width, C colour channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write

Frames = NDArray[np.uint8]

# Visually lossless for judging a model; the default of libx264 (23) blurs what is to be judged.
CONSTANT_RATE_FACTOR = "15"
GAP_PIXELS = 4
LABEL_PIXELS = 16


def write_mp4(path: Path, frames_FHWC: Frames, fps: float, comment: str = "") -> None:
    """Write frames as H.264 (yuv420p, BT.709, index in front so that browsers start at once), whole or not at all.

    Args:
        frames_FHWC: uint8 RGB; H and W even, as yuv420p halves them.
        fps: frames a second.
        comment: goes into the file's metadata, e.g. prompt and seed.

    Raises:
        UserError: odd sizes, or a file that cannot be written.
    """
    num_frames, height, width, channels = frames_FHWC.shape
    assert frames_FHWC.dtype == np.uint8
    assert channels == 3
    assert num_frames > 0
    if height % 2 or width % 2:
        raise UserError(f"{path}: frames of {height}x{width} pixels: mp4 needs even height and width")

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            if comment:
                container.metadata["comment"] = comment
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": CONSTANT_RATE_FACTOR, "preset": "medium"}
            _tag_bt709(stream.codec_context)
            for frame_HWC in frames_FHWC:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
                # Players take BT.709 from the tags, but the conversion must use the same matrix.
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
            container.mux(stream.encode())

    atomic_write(path, write)


def _tag_bt709(codec: Any) -> None:
    codec.color_primaries = ColorPrimaries.BT709
    codec.color_trc = ColorTrc.BT709
    codec.colorspace = Colorspace.ITU709
    codec.color_range = ColorRange.MPEG


def side_by_side(videos_FHWC: list[Frames]) -> Frames:
    """Videos of one length and height next to each other, with a white gap."""
    num_frames, height = videos_FHWC[0].shape[:2]
    gap_FHWC = np.full((num_frames, height, GAP_PIXELS, 3), 255, dtype=np.uint8)
    parts: list[Frames] = []
    for video_FHWC in videos_FHWC:
        parts += [gap_FHWC, video_FHWC] if parts else [video_FHWC]
    return np.concatenate(parts, axis=2)


def write_contact_sheet(path: Path, rows: Mapping[str, Frames], fps: float, num_columns: int = 6) -> None:
    """Write a PNG: for each video its label, then frames evenly spread from the first to the last under their times.

    Args:
        rows: label -> frames_FHWC, uint8 RGB.
        fps: for the times.
    """
    height, width = next(iter(rows.values())).shape[1:3]
    row_height = 2 * LABEL_PIXELS + height
    sheet = Image.new("RGB", (num_columns * (width + GAP_PIXELS) - GAP_PIXELS, len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, frames_FHWC) in enumerate(rows.items()):
        top = row * row_height
        draw.text((2, top + 2), label, fill="black")
        for column, index in enumerate(np.linspace(0, len(frames_FHWC) - 1, num_columns).round().astype(int)):
            left = column * (width + GAP_PIXELS)
            draw.text((left + 2, top + LABEL_PIXELS + 2), f"{index / fps:.1f} s", fill="black")
            sheet.paste(Image.fromarray(frames_FHWC[index]), (left, top + 2 * LABEL_PIXELS))
    atomic_write(path, lambda temporary: sheet.save(temporary, format="PNG"))
