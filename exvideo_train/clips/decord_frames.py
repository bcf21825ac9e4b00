"""Frames decoded by decord: the same moments as PyAV's, with decord's own conversion and resize.

decord is given the packets of the span alone, copied by PyAV from the key frame before it on, and reads them from the
first to the last. Given the whole file it would index all of it first, and then count frames in the order of their
packets: after a seek its frame n is another than the n-th shown, in MPEG-TS and wherever frames that are decoded
after a key frame are shown before it (x265's default).

Axis letters: H height, W width, C channel.
"""

from __future__ import annotations

import bisect
import errno
import io
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from exvideo_train.clips.container import (
    Reason,
    UnreadableClip,
    first_shown_size,
    open_video,
    stream_duration,
    stream_fps,
)
from exvideo_train.clips.timing import (
    SEEK_BACK_SECONDS,
    TIME_TOLERANCE_SECONDS,
    check_order,
    check_start,
    seek_to,
    why_ended,
)

if TYPE_CHECKING:
    import av.container
    import av.packet
    import av.video.stream

# H.264 and HEVC let no more frames than this be decoded before, and shown after, another one.
_MOST_REORDERED_FRAMES = 16
# With several threads decord loses their packets ("Error sending packet").
_ONE_THREAD_CODECS = ("vp9",)
_HD_LINES = 720
_UNSPECIFIED, _BT709 = 2, 1  # AVCOL_SPC_*
# Video that does not name its matrix is BT.709 from 720 lines on, as players take it to be; decord takes BT.601.
_TAG_AS_BT709 = {
    "h264": "h264_metadata=matrix_coefficients=1",
    "hevc": "hevc_metadata=matrix_coefficients=1",
    "av1": "av1_metadata=matrix_coefficients=1",
    "vp9": "vp9_metadata=color_space=bt709",
}


def iter_frames(
    video: str, moments: list[float], height: int, width: int, num_threads: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """The frames shown at ascending `moments`, in seconds from the video's first frame.

    Yields:
        (index of the moment, uint8 RGB frame of shape (H, W, C)); a frame shown at several moments comes several
        times.

    Raises:
        UnreadableClip: the video cannot be opened or decoded, or ends before the last moment.
    """
    import av

    span = _copy_span(video, moments[0], moments[-1])
    if moments[-1] >= span.until - TIME_TOLERANCE_SECONDS:
        raise why_ended(video, moments)
    shown = [max(bisect.bisect_right(span.times, moment + TIME_TOLERANCE_SECONDS) - 1, 0) for moment in moments]
    # Of the span's own first frame: videos are joined from unlike ones.
    with av.open(io.BytesIO(span.content), "r") as container:
        shown_height, shown_width = first_shown_size(video, container, container.streams.video[0])
    scale = max(height / shown_height, width / shown_width)
    # The same number of rows or columns is cut off at either side: half a pixel more or less would shift the picture.
    top, left = max(0, round((shown_height * scale - height) / 2)), max(0, round((shown_width * scale - width) / 2))
    reader = _Reader(video, span, height + 2 * top, width + 2 * left, num_threads)
    # A packet without a picture would shift all frames after it: then there are too few, and the last one is missed.
    frames = reader.frames([*dict.fromkeys(shown), len(span.times) - 1])
    for _, indices in itertools.groupby(range(len(moments)), shown.__getitem__):
        frame_HWC = next(frames)[top : top + height, left : left + width]
        for index in indices:
            yield index, frame_HWC
    next(frames)


@dataclass
class _Span:
    """A piece of a video that can be decoded on its own.

    Attributes:
        content: a Matroska file of it.
        codec: FFmpeg's name of its codec.
        times: when its frames are shown, ascending, in seconds from the whole video's first frame.
        until: when the last of them is no longer shown.
    """

    content: bytes
    codec: str
    times: list[float]
    until: float


def _copy_span(video: str, start: float, last: float) -> _Span:
    """The packets from the last key frame not after `start` to the frame shown at `last`, undecoded."""
    for back in SEEK_BACK_SECONDS:
        goal = max(start - back, 0.0)
        with open_video(video) as (container, stream):
            check_start(video, start, stream_duration(container, stream))
            origin = stream.start_time or 0
            if goal > 0 and not seek_to(goal, container, stream):
                continue
            packets, until = _take_packets(video, container, stream, origin, start, last)
            if goal > 0 and (not packets or packets[0][0] > start + TIME_TOLERANCE_SECONDS):
                continue
            times = _shown_times(video, [time for time, _ in packets])
            content = _write(video, stream, [packet for _, packet in packets]) if packets else b""
            return _Span(content, stream.codec_context.codec.canonical_name, times, until)
    raise AssertionError("the last attempt begins at the video's start")


def _take_packets(
    video: str,
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    origin: int,
    start: float,
    last: float,
) -> tuple[list[tuple[float, av.packet.Packet]], float]:
    """(time, packet) in the order of decoding, and until when the last of their frames is shown."""
    taken: list[tuple[float, Any]] = []
    decoded_at = -math.inf
    for packet in _demux(video, container, stream):
        if packet.pts is None or packet.time_base is None:
            raise UnreadableClip(Reason.BAD_TIMESTAMPS, f"{video} has frames without timestamps")
        moment = float((packet.pts - origin) * packet.time_base)
        # Matroska does not know it for the first packets.
        decodes = decoded_at if packet.dts is None else float((packet.dts - origin) * packet.time_base)
        check_order(video, start, decoded_at, decodes)
        decoded_at = max(decoded_at, decodes)
        if packet.is_keyframe and (not taken or moment <= start + TIME_TOLERANCE_SECONDS):
            taken = []
        elif not taken or moment < taken[0][0]:
            # Shown before the key frame that decoding begins with.
            continue
        taken.append((moment, packet))
        # No later packet can be shown earlier than it is decoded.
        if decodes > last + 2 * TIME_TOLERANCE_SECONDS:
            break
    return taken, _shown_until(video, stream, taken)


def _shown_until(video: str, stream: av.video.stream.VideoStream, taken: list[tuple[float, av.packet.Packet]]) -> float:
    """When the last frame is no longer shown; those that an edit list cuts off are decoded, but never shown."""
    ordered = sorted(taken, key=lambda entry: entry[0])
    shown = [number for number, (_, packet) in enumerate(ordered) if not packet.is_discard]
    if not shown:
        return -math.inf
    if shown[-1] - shown[0] >= len(shown):
        raise UnreadableClip(
            Reason.BAD_TIMESTAMPS, f"{video} has an edit list that cuts frames out of its middle; decoder=pyav reads it"
        )
    end, packet = ordered[shown[-1]]
    return end + _duration(packet, stream) + 2 * TIME_TOLERANCE_SECONDS


def _demux(
    video: str, container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> Iterator[av.packet.Packet]:
    import av

    try:
        for packet in container.demux(stream):
            # The last one is empty and tells a decoder to end.
            if packet.size:
                yield packet
    except (av.FFmpegError, OSError) as error:
        damaged = getattr(error, "errno", None) not in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
        raise UnreadableClip(Reason.CORRUPT if damaged else Reason.READ_ERROR, f"{video}: {error}") from None


def _duration(packet: av.packet.Packet, stream: av.video.stream.VideoStream) -> float:
    if packet.duration and packet.time_base:
        return float(packet.duration * packet.time_base)
    fps = stream_fps(stream)
    return 1.0 / fps if fps else 0.0


def _shown_times(video: str, decoded: list[float]) -> list[float]:
    """Times in the order of showing, from those in the order of decoding."""
    order = sorted(range(len(decoded)), key=decoded.__getitem__)
    for rank, position in enumerate(order):
        if rank - position > _MOST_REORDERED_FRAMES:
            raise UnreadableClip(
                Reason.BAD_TIMESTAMPS,
                f"{video} has a frame at {decoded[position]:.2f} s before {rank - position} earlier ones",
            )
    return [decoded[position] for position in order]


def _write(video: str, stream: av.video.stream.VideoStream, packets: list[av.packet.Packet]) -> bytes:
    """A Matroska file of these packets; its own timestamps do not matter, as its frames are counted."""
    import av

    target = io.BytesIO()
    try:
        _mux(stream, packets, target)
    except (av.FFmpegError, ValueError) as error:
        codec = stream.codec_context.codec.canonical_name
        if codec in _TAG_AS_BT709:
            raise UnreadableClip(Reason.CORRUPT, f"{video} has packets that no file can hold: {error}") from None
        raise UnreadableClip(
            Reason.UNSUPPORTED_CODEC, f"{video}: decord cannot be given {codec} ({error}); decoder=pyav reads it"
        ) from None
    return target.getvalue()


def _mux(stream: av.video.stream.VideoStream, packets: list[av.packet.Packet], target: io.BytesIO) -> None:
    import av
    from av.bitstream import BitStreamFilterContext

    codec = stream.codec_context
    with av.open(target, "w", format="matroska") as container:
        copy = container.add_stream_from_template(stream, opaque=True)
        tag: BitStreamFilterContext | None = None
        if int(codec.colorspace) == _UNSPECIFIED and codec.height >= _HD_LINES:
            copy.codec_context.colorspace = _BT709
            if codec.codec.canonical_name in _TAG_AS_BT709:
                # Annex B streams (MPEG-TS) carry in every key frame what others have in their header.
                in_header = not (codec.extradata or b"").startswith((b"\0\0\1", b"\0\0\0\1"))
                filters = _TAG_AS_BT709[codec.codec.canonical_name]
                tag = BitStreamFilterContext(filters, stream, copy if in_header else None)
        # decord wants to know a rate, and a few packets do not tell.
        copy.codec_context.framerate = stream.average_rate or Fraction(25)
        for packet in packets:
            for written in [packet] if tag is None else tag.filter(packet):
                written.stream = copy
                container.mux(written)


class _Reader:
    """decord on a span, read forwards."""

    def __init__(self, video: str, span: _Span, height: int, width: int, num_threads: int) -> None:
        self._decord = load_decord()
        self._video, self._span = video, span
        self._next = 0
        source = io.BytesIO(span.content)
        if span.codec in _ONE_THREAD_CODECS:
            num_threads = 1
        try:
            # decord hands out the frame before in place of one that is damaged, unless told how many it may.
            self._reader = self._decord.VideoReader(
                source, width=width, height=height, num_threads=num_threads, fault_tol=1e-9
            )
            self._key_frames: list[int] = self._reader.get_key_indices()
        except (self._decord.DECORDError, RuntimeError) as error:
            raise self._damaged(error) from None

    def frames(self, numbers: list[int]) -> Iterator[np.ndarray]:
        """The span's frames of these ascending numbers, uint8 RGB (H, W, C); the last may come twice."""
        frame_HWC: np.ndarray | None = None
        try:
            self._skip_to(numbers[0])
            for number, following in itertools.pairwise([*numbers, numbers[-1]]):
                if number >= self._next:
                    frame = self._take()
                    # At once: until told that it may skip them, decord converts the frames that come next.
                    self._skip_to(following)
                    frame_HWC = _unpadded(frame.asnumpy())
                assert frame_HWC is not None
                yield frame_HWC
        except (self._decord.DECORDError, self._decord.DECORDLimitReachedError, StopIteration) as error:
            raise self._damaged(error) from None

    def _take(self) -> Any:
        frame = self._reader.next()
        self._next += 1
        return frame

    def _skip_to(self, number: int) -> None:
        """Decode the frames before `number` unconverted, except for one before each key frame.

        To skip past a key frame decord would seek to it, and be wrong about which frame comes after it.
        """
        while self._next < number:
            place = bisect.bisect_right(self._key_frames, self._next)
            key_frame = self._key_frames[place] if place < len(self._key_frames) else number + 1
            goal = min(number, key_frame - 1)
            if goal > self._next:
                self._reader.skip_frames(goal - self._next)
                self._next = goal
            else:
                self._take()

    def _damaged(self, error: Exception) -> UnreadableClip:
        message = (str(error).strip().splitlines() or ["its frames end early"])[0]
        return UnreadableClip(
            Reason.CORRUPT, f"{self._video} after {self._span.times[max(self._next - 1, 0)]:.2f} s: decord: {message}"
        )


def _unpadded(frame_HWC: np.ndarray) -> np.ndarray:
    """decord takes a padded row for so many channels, which in a picture of under 128 columns may be more than 3."""
    rows = frame_HWC.reshape(frame_HWC.shape[0], -1)
    return rows[:, : 3 * frame_HWC.shape[1]].reshape(*frame_HWC.shape[:2], 3)


def load_decord() -> Any:
    """decord, after everything whose libraries must not be taken for decord's: it loads its FFmpeg for all to see."""
    for name in ("av", "av.bitstream", "av.filter", "torch"):
        import_module(name)
    decord = import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)
    return decord
