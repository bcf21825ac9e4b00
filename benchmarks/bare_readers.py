"""The shortest scripts that give a clip's frames: what anyone would write with bare PyAV, decord and torchcodec.

Each gives uint8 RGB (F, H, W, C), centre-cropped, of the frames shown at ``start + n / fps`` seconds.
Axis letters: F video frames, H height, W width, C channel.
"""

from __future__ import annotations

from typing import Any

import av
import numpy as np

from exvideo_train.geometry import Geometry


def with_decord(video: str, start: float, geometry: Geometry) -> np.ndarray:
    import decord

    height, width = decord.VideoReader(video, num_threads=1)[0].shape[:2]
    scale = max(geometry.height / height, geometry.width / width)
    height, width = round(height * scale), round(width * scale)
    reader = decord.VideoReader(video, width=width, height=height)
    begins = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    moments = start + np.arange(geometry.num_frames) / geometry.fps
    frames = reader.get_batch(np.searchsorted(begins, moments + 1e-3) - 1).asnumpy()
    return centre(frames, geometry)


def with_pyav(video: str, start: float, geometry: Geometry) -> np.ndarray:
    frames = np.empty((geometry.num_frames, geometry.height, geometry.width, 3), np.uint8)
    with av.open(video) as container:
        stream: Any = container.streams.video[0]
        stream.thread_type = "AUTO"
        container.seek(int(start / stream.time_base), stream=stream)
        scale = max(geometry.height / stream.height, geometry.width / stream.width)
        height, width = round(stream.height * scale), round(stream.width * scale)
        index = 0
        shown: Any = None
        for frame in container.decode(stream):
            while index < len(frames) and frame.time > start + index / geometry.fps + 1e-3:
                picture = shown.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
                frames[index] = centre(picture[None], geometry)[0]
                index += 1
            shown = frame
            if index == len(frames):
                break
    return frames


def with_torchcodec(video: str, start: float, geometry: Geometry) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    size: Any = VideoDecoder(video).metadata
    scale = max(geometry.height / size.height, geometry.width / size.width)
    resize = Resize((round(size.height * scale), round(size.width * scale)))
    decoder = VideoDecoder(video, dimension_order="NHWC", num_ffmpeg_threads=0, transforms=[resize])
    moments = [start + index / geometry.fps for index in range(geometry.num_frames)]
    return centre(decoder.get_frames_played_at(moments).data.numpy(), geometry)


def centre(frames_FHWC: np.ndarray, geometry: Geometry) -> np.ndarray:
    top = (frames_FHWC.shape[1] - geometry.height) // 2
    left = (frames_FHWC.shape[2] - geometry.width) // 2
    return frames_FHWC[:, top : top + geometry.height, left : left + geometry.width]
