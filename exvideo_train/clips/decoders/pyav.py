"""Frames decoded by PyAV; only those that are needed are converted.

Axis letters: H height, W width, C channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from exvideo_train.clips.container import (
    Reason,
    UnreadableClip,
    damaged,
    is_untagged_hd,
    open_video,
    quarter_turn,
    shown_seconds,
    shown_size,
    stream_duration,
)
from exvideo_train.clips.decoders.resize import crop_size
from exvideo_train.clips.decoders.timing import (
    SEEK_BACK_SECONDS,
    STEP_BACK_SECONDS,
    TIME_TOLERANCE_SECONDS,
    check_order,
    check_start,
    seek_to,
    why_ended,
)
from exvideo_train.clips.opening import set_decoder_options

if TYPE_CHECKING:
    import av.container
    import av.filter
    import av.video.frame
    import av.video.stream

# Against a float reference (BT.709 matrix, antialiased bicubic) of the example clip, mean absolute difference and CPU
# milliseconds a frame at 720x480: rgb24 2.1 and 2.8 (its short cut shifts all colours by 2), rgb24 with
# full_chroma_int 0.33 and 3.9, gbrp 0.33 and 1.4 (planar RGB has vectorised code in swscale).
_SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int"
_PLANAR_RGB = "gbrp"


def iter_frames(
    video: str, moments: list[float], height: int, width: int, num_threads: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """A `Decoder`."""
    scaler = _Scaler(video, height, width, num_threads)
    index = 0
    for shown, until, pixel_aspect in _shown_frames(video, moments[0], num_threads):
        frame_HWC: np.ndarray | None = None
        while index < len(moments) and moments[index] < until - TIME_TOLERANCE_SECONDS:
            if frame_HWC is None:
                frame_HWC = scaler(shown, pixel_aspect)
            yield index, frame_HWC
            index += 1
        if index == len(moments):
            return
    raise why_ended(video, moments)


def iter_window(
    video: str, start: float, end: float, long_side: int, num_threads: int = 0
) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame shown between two moments, small and uncropped, for judging a clip.

    Args:
        video: path, or ``shard.tar::member``.
        start, end: seconds from the video's first frame; a video that ends earlier just ends.
        long_side: length of the longer side of the frames in pixels.
        num_threads: decoder threads, 0 for one a core.

    Yields:
        (moment from which it is shown, uint8 RGB frame of shape (H, W, C)).

    Raises:
        UnreadableClip: the video cannot be opened or decoded.
    """
    scaler: _Scaler | None = None
    begins = start
    for shown, until, pixel_aspect in _shown_frames(video, start, num_threads):
        if scaler is None:
            scaler = _Scaler(video, *_small_size(shown, pixel_aspect, long_side), num_threads, crop=False)
        yield begins, scaler(shown, pixel_aspect)
        begins = until
        if until >= end - TIME_TOLERANCE_SECONDS:
            return


def _small_size(frame: av.video.frame.VideoFrame, pixel_aspect: float, long_side: int) -> tuple[int, int]:
    height, width = shown_size(frame, pixel_aspect)
    scale = long_side / max(width, height)
    # Measures are taken of blocks of 8 x 8.
    return max(8, round(height * scale)), max(8, round(width * scale))


def _shown_frames(
    video: str, start: float, num_threads: int
) -> Iterator[tuple[av.video.frame.VideoFrame, float, float]]:
    """Decoded frames from the one shown at `start` on, the moment until which each is shown, and its pixel aspect."""
    for back in SEEK_BACK_SECONDS:
        goal = max(start - back, 0.0)
        with open_video(video) as (container, stream):
            check_start(video, start, stream_duration(container, stream))
            _prepare_decoder(stream, num_threads)
            origin = stream.start_time or 0
            if goal > 0 and not seek_to(goal, container, stream):
                continue
            aspect = float(stream.sample_aspect_ratio or 1)
            frames = _timed_frames(container, stream, origin, start, video)
            try:
                shown = next(frames, None)
            except UnreadableClip as error:
                # Without a sound frame before it, the seek itself may be what spoils this one.
                if goal > 0 and error.reason == Reason.CORRUPT:
                    continue
                raise
            if goal > 0 and (shown is None or shown[1] > start + TIME_TOLERANCE_SECONDS):
                continue
            if shown is None:
                return
            if start > 0 and shown[1] > start + STEP_BACK_SECONDS:
                raise UnreadableClip(
                    Reason.CORRUPT, f"{video} shows nothing at {start:.2f} s, only from {shown[1]:.2f} s on"
                )
            for following in frames:
                if following[1] > start + TIME_TOLERANCE_SECONDS:
                    yield shown[0], following[1], aspect
                shown = following
            until = shown[1] + shown_seconds(shown[0], stream) + 2 * TIME_TOLERANCE_SECONDS
            if start < until - TIME_TOLERANCE_SECONDS:
                yield shown[0], until, aspect
            return


def _prepare_decoder(stream: av.video.stream.VideoStream, num_threads: int) -> None:
    stream.codec_context.thread_count = num_threads
    stream.thread_type = "AUTO"
    if stream.codec_context.name == "hevc":
        # Damaged HEVC decodes without a word otherwise; H.264 marks its damaged frames by itself.
        set_decoder_options(stream, err_detect="explode")


def _timed_frames(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    origin: int,
    start: float,
    video: str,
) -> Iterator[tuple[av.video.frame.VideoFrame, float]]:
    """Decoded frames in order of time with their seconds from the video's first frame.

    Damage before `start` is passed over with all frames up to the next key frame, as they may have been made of it:
    after a seek into the middle the first packets may lack their references.
    """
    import av

    seconds = -math.inf
    clean = damage = lost = False
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            frames = packet.decode()
        except StopIteration:
            return
        except (av.FFmpegError, OSError) as error:
            reason = damaged(f"{video} after {max(seconds, 0):.2f} s", error)
            before = seconds < start - TIME_TOLERANCE_SECONDS and not isinstance(error, av.error.EOFError)
            if reason.reason != Reason.CORRUPT or not before:
                raise reason from None
            # A recording that begins in mid-stream shows nothing until it can: that is its start.
            damage, lost = True, start > 0
            continue
        for frame in frames:
            if frame.pts is None or frame.time_base is None:
                raise UnreadableClip(Reason.BAD_TIMESTAMPS, f"{video} has frames without timestamps")
            moment = float((frame.pts - origin) * frame.time_base)
            check_order(video, start, seconds, moment)
            # A small step back comes of damage; a frame is shown when its predecessor was.
            seconds = max(seconds, moment)
            # Frames after a seek are marked until all that they refer to has been decoded: that is no damage.
            damage = (damage and not frame.key_frame) or (frame.is_corrupt and (clean or frame.key_frame))
            doubtful = damage or frame.is_corrupt
            before = seconds < start - TIME_TOLERANCE_SECONDS
            if doubtful and before:
                lost = True
                continue
            # The one before it is shown at `start`, if this one comes later.
            if doubtful or (lost and seconds > start + TIME_TOLERANCE_SECONDS):
                raise UnreadableClip(Reason.CORRUPT, f"{video} has a damaged frame at {seconds:.2f} s or before")
            clean, lost = True, False
            yield frame, seconds


class _Scaler:
    """Upright, centre-cropped, antialiased RGB of a fixed size, one frame at a time.

    swscale's bicubic widens its filter when it shrinks, which is what antialiasing means.
    """

    def __init__(self, video: str, height: int, width: int, num_threads: int, crop: bool = True) -> None:
        self._video = video
        self._height, self._width, self._threads, self._crop = height, width, num_threads, crop
        self._pixel_aspect = 1.0
        self._graph: av.filter.Graph | None = None
        self._signature: tuple[object, ...] = ()
        self._turn = 0

    def __call__(self, frame: av.video.frame.VideoFrame, pixel_aspect: float) -> np.ndarray:
        """uint8 (H, W, C) of the target size.

        Raises:
            UnreadableClip: the frame has a size or format that cannot be converted.
        """
        import av

        try:
            return self._scale(frame, pixel_aspect)
        except (av.FFmpegError, MemoryError) as error:
            raise damaged(f"{self._video} has frames of {frame.width}x{frame.height}", error) from None

    def _scale(self, frame: av.video.frame.VideoFrame, pixel_aspect: float) -> np.ndarray:
        signature = (
            frame.width,
            frame.height,
            frame.format.name,
            int(frame.colorspace),
            int(frame.color_range),
        )
        if self._graph is None or signature != self._signature:
            # Resolution may change in mid-stream; each kind of frame gets its own graph.
            self._turn = quarter_turn(frame.rotation)
            self._pixel_aspect = pixel_aspect
            self._graph = self._build(frame)
            self._signature = signature
        self._graph.vpush(frame)
        picture = self._graph.vpull().to_ndarray()
        return np.ascontiguousarray(np.rot90(picture, self._turn // 90)) if self._turn else picture

    def _build(self, frame: av.video.frame.VideoFrame) -> av.filter.Graph:
        import av.filter

        sideways = self._turn in (90, 270)
        height, width = (self._width, self._height) if sideways else (self._height, self._width)
        crop_height, crop_width = frame.height, frame.width
        if self._crop:
            crop_height, crop_width = crop_size(frame.height, frame.width, height, width, self._pixel_aspect)
        # The frame's own YUV matrix, or what players take it to be.
        matrix = "bt709" if is_untagged_hd(int(frame.colorspace), frame.height) else "auto"
        graph = av.filter.Graph()
        graph.threads = self._threads
        graph.link_nodes(
            graph.add(
                "buffer",
                video_size=f"{frame.width}x{frame.height}",
                pix_fmt=frame.format.name,
                time_base=str(frame.time_base),
                colorspace=str(int(frame.colorspace)),
                range=str(int(frame.color_range)),
            ),
            graph.add("crop", f"{crop_width}:{crop_height}"),
            graph.add("scale", f"{width}:{height}:flags={_SCALE_FLAGS}:in_color_matrix={matrix}"),
            graph.add("format", _PLANAR_RGB),
            graph.add("buffersink"),
        )
        graph.configure(auto_buffer=False)
        return graph
