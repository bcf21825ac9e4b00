"""Opening a video, whether a file or a member of a tar shard, and saying exactly why one cannot be read."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from exvideo_train.clips.opening import FORMATS, MAX_PIXEL_ASPECT, MAX_PIXELS, open_media, refused_format
from exvideo_train.clips.record import TAR_SEPARATOR
from exvideo_train.clips.shards import MAX_MEMBER_BYTES, DamagedShard, Member, iter_members

if TYPE_CHECKING:
    import av.container
    import av.video.frame
    import av.video.stream


class Reason(str, Enum):
    """Why a clip cannot be read; the values are stable words that reports and quarantine lists use."""

    MISSING = "missing"
    """No such file, shard or member."""
    NOT_A_FILE = "not_a_file"
    """A folder, a pipe, a device or, in a shard, a link."""
    OUTSIDE = "outside"
    """Not in the folder that was given: by its path, or through a link."""
    PERMISSION = "permission"
    """The file may not be read."""
    READ_ERROR = "read_error"
    """The disk or network file system failed."""
    EMPTY_FILE = "empty_file"
    """Zero bytes."""
    NOT_VIDEO = "not_video"
    """Not a media file, whatever its name says."""
    UNSUPPORTED_FORMAT = "unsupported_format"
    """A kind of media file that is not opened, e.g. a playlist or a stream description."""
    TRUNCATED = "truncated"
    """The file ends before what its header promises."""
    NO_VIDEO_STREAM = "no_video_stream"
    """Media without video, e.g. audio only."""
    UNSUPPORTED_CODEC = "unsupported_codec"
    """No decoder for its codec."""
    BAD_SPAN = "bad_span"
    """The span is negative, empty or reversed."""
    SPAN_PAST_END = "span_past_end"
    """The span reaches beyond the end of the video."""
    TOO_SHORT = "too_short"
    """The span, or the video, is shorter than the frames asked for."""
    BAD_TIMESTAMPS = "bad_timestamps"
    """Frames without timestamps, or with timestamps that step back or leap ahead."""
    CORRUPT = "corrupt"
    """Damaged inside: packets that do not decode."""
    TOO_LARGE = "too_large"
    """Larger pictures, or more memory to decode, than a video may take."""
    TIMEOUT = "timeout"
    """Decoding took longer than allowed; set by whoever watches the worker."""
    WORKER_DIED = "worker_died"
    """The decoder killed its process; set by whoever watches the worker."""

    def __str__(self) -> str:
        return self.value


_HD_LINES = 720
_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
# What another attempt may not meet again: journals do not note these.
PASSING_REASONS = frozenset(map(str, (Reason.TIMEOUT, Reason.WORKER_DIED, Reason.READ_ERROR)))


class UnreadableClip(Exception):
    """A clip that cannot be read; `reason` is a word of `Reason`, `detail` says more for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = str(reason)
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header says. Width and height are as shown: rotation and pixel aspect applied."""

    fps: float
    width: int
    height: int
    duration_seconds: float | None
    codec: str


def split_video(video: str) -> tuple[str, str | None]:
    """``shard.tar::member`` as its two parts; a plain path has no member."""
    shard, separator, member = video.rpartition(f".tar{TAR_SEPARATOR}")
    return (f"{shard}.tar", member) if separator else (video, None)


@lru_cache(maxsize=16)
def _shard_members(path: str, _size: int, _modified: int) -> tuple[dict[str, Member], str]:
    """Every regular member, and what is wrong behind them; cached, as a shard's clips are read one after another."""
    members: dict[str, Member] = {}
    with open(path, "rb") as shard:
        try:
            members.update((member.name, member) for member in iter_members(shard.fileno()) if not member.kind)
        except DamagedShard as damage:
            return members, str(damage)
    return members, ""


def _check_file(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
        # Opening a pipe would wait for its writer.
        if stat.S_ISREG(status.st_mode):
            os.close(os.open(path, os.O_RDONLY))
    except (FileNotFoundError, NotADirectoryError):
        raise UnreadableClip(Reason.MISSING, f"{path} does not exist") from None
    except PermissionError:
        raise UnreadableClip(Reason.PERMISSION, f"{path} may not be read") from None
    except OSError as error:
        raise UnreadableClip(Reason.READ_ERROR, f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableClip(Reason.NOT_A_FILE, f"{path} is not a regular file")
    if status.st_size == 0:
        raise UnreadableClip(Reason.EMPTY_FILE, f"{path} has 0 bytes")
    return status


def read_member(path: str, member: str) -> bytes:
    """Content of one member of a tar shard, without unpacking the rest.

    Raises:
        UnreadableClip: the shard or member is missing, empty, damaged or may not be read.
    """
    status = _check_file(path)
    members, damage = _shard_members(path, status.st_size, status.st_mtime_ns)
    found = members.get(member)
    if found is None:
        if damage:
            raise UnreadableClip(Reason.CORRUPT, f"{path} is not a whole tar file: {damage}")
        raise UnreadableClip(Reason.MISSING, f"{path} has no member {member}")
    if found.size == 0:
        raise UnreadableClip(Reason.EMPTY_FILE, f"{path}{TAR_SEPARATOR}{member} has 0 bytes")
    if found.size > MAX_MEMBER_BYTES:
        raise UnreadableClip(
            Reason.TOO_LARGE, f"{path}{TAR_SEPARATOR}{member} has {found.size:,} bytes; unpack the shard"
        )
    with open(path, "rb") as stream:
        stream.seek(found.offset)
        content = stream.read(found.size)
    if len(content) != found.size:
        raise UnreadableClip(Reason.TRUNCATED, f"{path} ends inside member {member}")
    return content


@contextmanager
def open_bytes(video: str) -> Iterator[tuple[BinaryIO, int]]:
    """The bytes of a video, and how many they are; a member of a shard is read whole.

    Raises:
        UnreadableClip: the file is missing, empty, or may not be read.
    """
    path, member = split_video(video)
    if member is not None:
        content = read_member(path, member)
        yield io.BytesIO(content), len(content)
        return
    size = _check_file(path).st_size
    with open(path, "rb") as stream:
        yield stream, size


@contextmanager
def open_video(video: str) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """The opened container and its main video stream, closed again on leaving.

    Raises:
        UnreadableClip: with the reason why not.
    """
    path, member = split_video(video)
    if member is None:
        _check_file(path)
        source: str | io.BytesIO = path
    else:
        source = io.BytesIO(read_member(path, member))
    with opened(video, source) as (container, stream):
        yield container, stream


@contextmanager
def opened(
    video: str, source: str | io.BytesIO
) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """:func:`open_video` of a path or content that is there; whatever FFmpeg raises meanwhile is the clip's fault.

    Raises:
        UnreadableClip: with the reason why not.
    """
    import av

    try:
        container = open_media(source)
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise _why_not_opened(error, video, source) from None
    try:
        stream = _main_video_stream(container)
        if stream is None:
            kinds = ", ".join(sorted({entry.type for entry in container.streams})) or "nothing"
            raise UnreadableClip(Reason.NO_VIDEO_STREAM, f"{video} holds {kinds}")
        if stream.codec_context is None:
            raise UnreadableClip(Reason.UNSUPPORTED_CODEC, f"{video} has a codec without a decoder")
        _check_shape(video, stream)
        yield container, stream
    except (av.FFmpegError, MemoryError) as error:
        raise damaged(video, error) from None
    finally:
        container.close()


def damaged(video: str, error: Exception) -> UnreadableClip:
    """What an error of reading or decoding says of a video."""
    code = getattr(error, "errno", None)
    if code in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        return UnreadableClip(Reason.READ_ERROR, f"{video}: {error}")
    if code == errno.ENOMEM or isinstance(error, MemoryError):
        return UnreadableClip(Reason.TOO_LARGE, f"{video} takes more memory to decode than a video may")
    return UnreadableClip(Reason.CORRUPT, f"{video}: {error}")


def _check_shape(video: str, stream: av.video.stream.VideoStream) -> None:
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise UnreadableClip(
            Reason.TOO_LARGE, f"{video} claims pictures of {width}x{height}; {MAX_PIXELS:,} pixels are the most"
        )
    aspect = stream.sample_aspect_ratio or 1
    if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        raise UnreadableClip(Reason.CORRUPT, f"{video} claims pixels {float(aspect):g} times as wide as high")


def _main_video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream | None:
    from av.stream import Disposition

    for stream in container.streams.video:
        # Cover art of an audio file is a "video" of one picture.
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def _why_not_opened(error: Exception, video: str, source: str | io.BytesIO) -> UnreadableClip:
    code = getattr(error, "errno", None)
    if code in (errno.EACCES, errno.EPERM):
        return UnreadableClip(Reason.PERMISSION, f"{video} may not be read")
    reading = damaged(video, error)
    if reading.reason != Reason.CORRUPT:
        return reading
    if code == errno.EINVAL and (found := refused_format(source)):
        return UnreadableClip(
            Reason.UNSUPPORTED_FORMAT, f"{video} is a file of format {found}; opened are {', '.join(FORMATS)}"
        )
    head = source.getvalue()[:64] if isinstance(source, io.BytesIO) else _head(source)
    if _is_media(head):
        return UnreadableClip(Reason.TRUNCATED, f"{video} begins as a video but its index is missing or cut off")
    return UnreadableClip(Reason.NOT_VIDEO, f"{video} is not a video file")


def _head(path: str) -> bytes:
    with open(Path(path), "rb") as stream:
        return stream.read(64)


def _is_media(head: bytes) -> bool:
    """Whether the first bytes are those of MP4/MOV, Matroska/WebM, AVI, FLV, MPEG-TS or MPEG-PS."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return True
    return head.startswith((b"\x1aE\xdf\xa3", b"RIFF", b"FLV", b"\x00\x00\x01\xba")) or (
        head[:1] == b"\x47" and len(head) < 189
    )


def stream_fps(stream: av.video.stream.VideoStream) -> float:
    """Average frames a second, 0 when the header does not say."""
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return float(rate) if rate else 0.0


def quarter_turn(degrees: int) -> int:
    """Rotation metadata rounded to 0, 90, 180 or 270 degrees counter-clockwise that bring a picture upright."""
    return round(degrees / 90) * 90 % 360


def shown_size(frame: av.video.frame.VideoFrame, pixel_aspect: float) -> tuple[int, int]:
    """Height and width of a frame as shown: rotation and pixel aspect applied."""
    width, height = round(frame.width * pixel_aspect), frame.height
    return (width, height) if quarter_turn(frame.rotation) in (90, 270) else (height, width)


def first_frame(
    video: str, container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> av.video.frame.VideoFrame:
    """The next frame of a container just opened.

    Raises:
        UnreadableClip: the frame cannot be decoded, or there is none.
    """
    import av

    stream.codec_context.thread_count = 1
    try:
        frame = next(container.decode(stream), None)
    except (av.FFmpegError, OSError) as error:
        raise damaged(f"{video}: no frame can be decoded at its start or the span's", error) from None
    if frame is None:
        raise UnreadableClip(Reason.TRUNCATED, f"{video} holds no frame from its start or the span's on")
    return frame


def probe_video(video: str) -> VideoInfo:
    """Rate, size, length and codec of a video; one frame is decoded, because rotation is told by frames.

    Raises:
        UnreadableClip: the video cannot be opened or its first frame not decoded.
    """
    with open_video(video) as (container, stream):
        fps, codec = stream_fps(stream), stream.codec_context.name
        duration = stream_duration(container, stream)
        height, width = shown_size(first_frame(video, container, stream), float(stream.sample_aspect_ratio or 1))
    return VideoInfo(fps, width, height, duration, codec)


def shown_seconds(shown: av.video.frame.VideoFrame | av.packet.Packet, stream: av.video.stream.VideoStream) -> float:
    """How long a frame, or a packet's frame, is shown: its own duration, else that of the stream's rate, else 0."""
    if shown.duration and shown.time_base:
        return float(shown.duration * shown.time_base)
    fps = stream_fps(stream)
    return 1.0 / fps if fps else 0.0


def is_untagged_hd(matrix: int, height: int) -> bool:
    """Whether frames of this YUV matrix (AVCOL_SPC_*) and height are BT.709 unsaid, as players take them to be."""
    return matrix == _UNSPECIFIED and height >= _HD_LINES


def stream_duration(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> float | None:
    """Length of the video stream in seconds as the header says; None when it does not."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return float(container.duration) / 1_000_000
    return None
