"""Frames to files that a person looks at: mp4 and contact sheet.

Axis letters: H height, W width, C colour channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from exvideo_train.clips.container import open_video
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write

Frame = NDArray[np.uint8]

# Visually lossless for judging a model; the default of libx264 (23) blurs what is to be judged.
CONSTANT_RATE_FACTOR = "15"
GAP_PIXELS = 4
LABEL_PIXELS = 16


def write_mp4(path: Path, frames: Iterable[Frame], fps: float, comment: str = "") -> None:
    """Write frames as they come, as H.264 (yuv420p, BT.709, index in front so that browsers start at once).

    The file is there whole or not at all.

    Args:
        frames: uint8 RGB (H, W, 3) of one size; H and W even, as yuv420p halves them.
        fps: frames a second.
        comment: goes into the file's metadata, e.g. how the video was made.

    Raises:
        UserError: odd sizes, or a file that cannot be written.
    """

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            if comment:
                container.metadata["comment"] = comment
            stream: av.VideoStream | None = None
            for frame_HWC in frames:
                assert frame_HWC.dtype == np.uint8
                if stream is None:
                    stream = _h264_stream(container, path, frame_HWC.shape, fps)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
                # Players take BT.709 from the tags, but the conversion must use the same matrix.
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
            assert stream is not None, "a video of no frames"
            container.mux(stream.encode())

    atomic_write(path, write)


def _h264_stream(container: OutputContainer, path: Path, shape: tuple[int, ...], fps: float) -> av.VideoStream:
    height, width, channels = shape
    assert channels == 3
    if height % 2 or width % 2:
        raise UserError(f"{path}: frames of {height}x{width} pixels: mp4 needs even height and width")
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"crf": CONSTANT_RATE_FACTOR, "preset": "medium"}
    _tag_bt709(stream.codec_context)
    return stream


def read_mp4(path: Path) -> Iterator[Frame]:
    """The frames of a video that :func:`write_mp4` wrote, one at a time, uint8 RGB (H, W, 3)."""
    with open_video(str(path)) as (container, stream):
        for frame in container.decode(stream):
            yield cast(Frame, frame.to_ndarray(format="rgb24"))


def _tag_bt709(codec: Any) -> None:
    codec.color_primaries = ColorPrimaries.BT709
    codec.color_trc = ColorTrc.BT709
    codec.colorspace = Colorspace.ITU709
    codec.color_range = ColorRange.MPEG


def side_by_side(frames: Sequence[Frame]) -> Frame:
    """Frames of one height next to each other, with a white gap."""
    gap_HWC = np.full((frames[0].shape[0], GAP_PIXELS, 3), 255, dtype=np.uint8)
    parts = [part for frame_HWC in frames for part in (gap_HWC, frame_HWC)]
    return np.concatenate(parts[1:], axis=1)


def compare_videos(videos: Mapping[str, Path], fps: float, both: Path | None, sheet: Path) -> None:
    """Read videos of one size once, and write the comparisons of them: memory does not grow with their length.

    Args:
        videos: label -> file.
        both: mp4 of all of them next to each other, as far as the shortest goes; None for one alone.
        sheet: PNG of each video's label and frames, see :class:`ContactSheet`.
    """
    pictures = {label: ContactSheet.of(path) for label, path in videos.items()}

    def frames() -> Iterator[Frame]:
        for index, at_once in enumerate(zip(*(read_mp4(path) for path in videos.values()), strict=False)):
            for picture, frame_HWC in zip(pictures.values(), at_once, strict=True):
                picture.take(index, frame_HWC)
            yield side_by_side(at_once)

    if both is not None:
        write_mp4(both, frames(), fps, f"from left to right: {', '.join(videos)}")
    else:
        for _ in frames():
            pass
    write_contact_sheet(sheet, pictures, fps)


class ContactSheet:
    """Frames of one video, evenly spread from the first to the last.

    Args:
        num_frames: of the video.
        num_columns: frames kept.
    """

    def __init__(self, num_frames: int, num_columns: int = 6) -> None:
        self.indices = [int(index) for index in np.linspace(0, num_frames - 1, num_columns).round()]
        self.frames: dict[int, Frame] = {}

    @classmethod
    def of(cls, path: Path) -> ContactSheet:
        """For a video that :func:`write_mp4` wrote."""
        with open_video(str(path)) as (_, stream):
            return cls(stream.frames)

    def take(self, index: int, frame_HWC: Frame) -> None:
        """Keep the frame if it is one of those shown."""
        if index in self.indices:
            self.frames[index] = frame_HWC


def write_contact_sheet(path: Path, rows: Mapping[str, ContactSheet], fps: float) -> None:
    """Write a PNG: for each video its label, then its frames under their times.

    Args:
        rows: label -> frames, of one size.
        fps: for the times.
    """
    shown = next(iter(rows.values()))
    height, width = next(iter(shown.frames.values())).shape[:2]
    num_columns, row_height = len(shown.indices), 2 * LABEL_PIXELS + height
    picture = Image.new("RGB", (num_columns * (width + GAP_PIXELS) - GAP_PIXELS, len(rows) * row_height), "white")
    draw = ImageDraw.Draw(picture)
    for row, (label, sheet) in enumerate(rows.items()):
        top = row * row_height
        draw.text((2, top + 2), label, fill="black")
        for column, index in enumerate(sheet.indices):
            left = column * (width + GAP_PIXELS)
            draw.text((left + 2, top + LABEL_PIXELS + 2), f"{index / fps:.1f} s", fill="black")
            picture.paste(Image.fromarray(sheet.frames[index]), (left, top + 2 * LABEL_PIXELS))
    atomic_write(path, lambda temporary: picture.save(temporary, format="PNG"))
