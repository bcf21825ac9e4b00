"""The packets of a span, copied undecoded into a small file of their own, for a decoder that cannot seek.

PyAV reads every container and knows when each packet's frame is shown; what it copies begins with a key frame and
holds nothing that the span does not need.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from exvideo_train.clips.container import (
    Reason,
    UnreadableClip,
    damaged,
    is_untagged_hd,
    open_video,
    shown_seconds,
    stream_duration,
)
from exvideo_train.clips.decoders.timing import (
    SEEK_BACK_SECONDS,
    TIME_TOLERANCE_SECONDS,
    check_order,
    check_start,
    seek_to,
)

if TYPE_CHECKING:
    import av.container
    import av.packet
    import av.video.stream

# H.264 and HEVC let no more frames than this be decoded before, and shown after, another one.
_MOST_REORDERED_FRAMES = 16
# Their key frames refer to nothing before them, nor do the frames that follow.
_CODECS_OF_CLOSED_GROUPS = ("vp9", "av1")
_EVEN_RATE = Fraction(25)
_BT709 = 1  # AVCOL_SPC_BT709
# decord takes all untagged video for BT.601.
_TAG_AS_BT709 = {
    "h264": "h264_metadata=matrix_coefficients=1",
    "hevc": "hevc_metadata=matrix_coefficients=1",
    "av1": "av1_metadata=matrix_coefficients=1",
    "vp9": "vp9_metadata=color_space=bt709",
}

_TimedPacket = tuple[float, "av.packet.Packet"]


class NotForDecord(UnreadableClip):
    """A clip that cannot be handed on as a file of its own, although it may be well."""


@dataclass
class SpanPart:
    """A piece of a span that can be decoded on its own.

    Attributes:
        content: a Matroska file of it.
        times: when its frames are shown, ascending, in seconds from the whole video's first frame.
    """

    content: bytes
    times: list[float]


@dataclass
class Span:
    """A piece of a video.

    Attributes:
        parts: one after the other.
        codec: FFmpeg's name of its codec.
        pixel_aspect: width over height of its pixels as stored.
        until: when its last frame is no longer shown, in seconds from the video's first frame.
    """

    parts: list[SpanPart]
    codec: str
    pixel_aspect: float
    until: float


def copy_span(video: str, start: float, last: float, max_parts: int = 1) -> Span:
    """The packets from the last key frame not after `start` to the frame shown at `last`, undecoded.

    Args:
        video: path, or ``shard.tar::member``.
        start, last: moments of the first and the last frame that are wanted, in seconds from the video's first frame.
        max_parts: into so many parts of about the same length, where its codec lets them be told apart.

    Raises:
        UnreadableClip: the video cannot be opened or its packets are damaged.
        NotForDecord: they cannot be counted or copied.
    """
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
            codec = stream.codec_context.codec.canonical_name
            pieces = _split(packets, max_parts) if codec in _CODECS_OF_CLOSED_GROUPS else [packets]
            parts = [_copy_part(video, stream, piece) for piece in pieces if piece]
            return Span(parts, codec, float(stream.sample_aspect_ratio or 1), until)
    raise AssertionError("the last attempt begins at the video's start")


def _take_packets(
    video: str,
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    origin: int,
    start: float,
    last: float,
) -> tuple[list[_TimedPacket], float]:
    """(time, packet) in the order of decoding, and until when the last of their frames is shown.

    Raises:
        NotForDecord: times step back, or an edit list cuts frames out of the span: which frame is shown when is for
            a decoder to say.
    """
    taken: list[tuple[float, Any]] = []
    decoded_at = -math.inf
    for packet in _demux(video, container, stream):
        if packet.pts is None or packet.time_base is None:
            raise UnreadableClip(Reason.BAD_TIMESTAMPS, f"{video} has frames without timestamps")
        moment = float((packet.pts - origin) * packet.time_base)
        # Matroska does not know it for the first packets.
        decodes = decoded_at if packet.dts is None else float((packet.dts - origin) * packet.time_base)
        check_order(video, start, decoded_at, decodes)
        if taken and decodes < decoded_at - TIME_TOLERANCE_SECONDS:
            raise NotForDecord(Reason.BAD_TIMESTAMPS, f"{video} steps back at {decodes:.2f} s")
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
    first = max((moment for moment, _ in taken if moment <= start + TIME_TOLERANCE_SECONDS), default=start)
    if any(packet.is_discard and first <= moment <= last + TIME_TOLERANCE_SECONDS for moment, packet in taken):
        raise NotForDecord(Reason.BAD_TIMESTAMPS, f"{video} has an edit list that cuts frames out of the span")
    return taken, _shown_until(stream, taken)


def _split(packets: list[_TimedPacket], max_parts: int) -> list[list[_TimedPacket]]:
    """Pieces of about the same length that begin with key frames."""
    moments = [moment for moment, _ in packets]
    if moments != sorted(moments):
        return [packets]
    parts: list[list[_TimedPacket]] = [[]]
    for entry in packets:
        if entry[1].is_keyframe and len(parts[-1]) * max_parts >= len(packets):
            parts.append([])
        parts[-1].append(entry)
    return parts


def _copy_part(video: str, stream: av.video.stream.VideoStream, packets: list[_TimedPacket]) -> SpanPart:
    times = [time for time, _ in packets]
    order = _shown_order(video, times)
    content = _write(video, stream, [packet for _, packet in packets], order)
    return SpanPart(content, [times[position] for position in order])


def _shown_until(stream: av.video.stream.VideoStream, taken: list[_TimedPacket]) -> float:
    """When the last frame is no longer shown; those that an edit list cuts off are decoded, but never shown."""
    shown = [entry for entry in taken if not entry[1].is_discard]
    if not shown:
        return -math.inf
    begin, packet = max(shown, key=lambda entry: entry[0])
    return begin + shown_seconds(packet, stream) + 2 * TIME_TOLERANCE_SECONDS


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
        raise damaged(video, error) from None


def _shown_order(video: str, decoded: list[float]) -> list[int]:
    """Positions in the order of showing, from the times in the order of decoding."""
    order = sorted(range(len(decoded)), key=decoded.__getitem__)
    for rank, position in enumerate(order):
        if rank - position > _MOST_REORDERED_FRAMES:
            raise UnreadableClip(
                Reason.BAD_TIMESTAMPS,
                f"{video} has a frame at {decoded[position]:.2f} s before {rank - position} earlier ones",
            )
    return order


def _write(
    video: str, stream: av.video.stream.VideoStream, packets: list[av.packet.Packet], shown_order: list[int]
) -> bytes:
    """A Matroska file of these packets at an even rate: decord is not to meet the times of the video.

    It skips frames by their times, which Matroska rounds to milliseconds, and guesses their number from their rate.
    """
    import av

    for rank, position in enumerate(shown_order):
        packet = packets[position]
        packet.time_base = 1 / _EVEN_RATE
        packet.pts, packet.dts, packet.duration = rank, position - _MOST_REORDERED_FRAMES, 1
    target = io.BytesIO()
    try:
        _mux(stream, packets, target)
    except (av.FFmpegError, ValueError) as error:
        codec = stream.codec_context.codec.canonical_name
        if codec in _TAG_AS_BT709 and isinstance(error, av.error.InvalidDataError):
            raise UnreadableClip(Reason.CORRUPT, f"{video} has packets that no file can hold: {error}") from None
        raise NotForDecord(Reason.UNSUPPORTED_CODEC, f"{video}: decord cannot be given {codec} ({error})") from None
    return target.getvalue()


def _mux(stream: av.video.stream.VideoStream, packets: list[av.packet.Packet], target: io.BytesIO) -> None:
    import av
    from av.bitstream import BitStreamFilterContext

    codec = stream.codec_context
    with av.open(target, "w", format="matroska") as container:
        copy = container.add_stream_from_template(stream, opaque=True)
        tag: BitStreamFilterContext | None = None
        if is_untagged_hd(int(codec.colorspace), codec.height):
            copy.codec_context.colorspace = _BT709
            if codec.codec.canonical_name in _TAG_AS_BT709:
                # Annex B streams (MPEG-TS) carry in every key frame what others have in their header.
                in_header = not (codec.extradata or b"").startswith((b"\0\0\1", b"\0\0\0\1"))
                filters = _TAG_AS_BT709[codec.codec.canonical_name]
                tag = BitStreamFilterContext(filters, stream, copy if in_header else None)
        copy.codec_context.framerate = _EVEN_RATE
        for packet in packets:
            for written in [packet] if tag is None else tag.filter(packet):
                written.stream = copy
                container.mux(written)
