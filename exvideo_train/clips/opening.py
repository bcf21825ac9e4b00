"""The one place that opens media: of the formats below alone, and never anything but what it was given.

FFmpeg takes a file for what its content says. A playlist opens what it lists, a stream description listens on the
network, a table's ``concat:a|b`` reads two other files: none of it is wanted from a file that somebody uploaded.
"""

from __future__ import annotations

import io
import os
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av.container
    import av.video.stream

# What videos are published in, by FFmpeg's names: MP4/MOV/3GP, Matroska/WebM, AVI, MPEG-TS and -PS, FLV, WMV, Ogg, GIF.
# All of these hold their own content; MOV, which may refer to other files, is told not to.
FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif")
# 8K as coded: 8192 x 4352. One frame of it takes 53 MB in 8 bits, and decoders keep 17.
MAX_PIXELS = 8192 * 4352
# Stretched pixels of real videos are between 1:2 and 3:1.
MAX_PIXEL_ASPECT = 16
MAX_DECODER_GIB = 8
_CONTAINER_OPTIONS = {
    "format_whitelist": ",".join(FORMATS),
    "enable_drefs": "0",
    "use_absolute_path": "0",
}
_DECODER_OPTIONS = {"max_pixels": str(MAX_PIXELS)}


def open_media(source: str | io.BytesIO) -> av.container.InputContainer:
    """A container of an allowed format, read from exactly this file or these bytes.

    Args:
        source: a path, whatever it looks like, or the content.

    Raises:
        av.FFmpegError, OSError, ValueError: as PyAV raises them; see :func:`refused_format`.
    """
    import av

    if isinstance(source, str):
        # With its protocol said, no name is taken for another ("concat:a|b", "http://...").
        source, protocols = f"file:{os.path.abspath(source)}", "file"
    else:
        source.seek(0)
        protocols = ""
    container = av.open(
        source,
        mode="r",
        metadata_errors="replace",
        options=_DECODER_OPTIONS,
        container_options={**_CONTAINER_OPTIONS, "protocol_whitelist": protocols},
    )
    for stream in container.streams.video:
        if stream.codec_context is not None:
            set_decoder_options(stream)
    return container


def set_decoder_options(stream: av.video.stream.VideoStream, **options: str) -> None:
    """Options of a stream's decoder, those that bound it among them."""
    stream.codec_context.options = {**_DECODER_OPTIONS, **options}


def refused_format(source: str | io.BytesIO) -> str | None:
    """FFmpeg's name of the format for which :func:`open_media` refuses a source, None if it does so for another reason.

    Only FFmpeg's log tells it; the source is opened once more to read it there.
    """
    import av.logging

    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    # Else it keeps back what another file was refused with already.
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as messages:
            open_media(source).close()
    except (av.FFmpegError, OSError, ValueError):
        pass
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)
    return next((name for _, name, message in messages if message.startswith("Format not on whitelist")), None)


def bound_memory() -> None:
    """Let this process, which decodes foreign videos, allocate no more than MAX_DECODER_GIB from now on.

    A header of a kilobyte can promise an index of gigabytes; a decoder that is refused memory costs its clip, one that
    is not may cost the machine.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = MAX_DECODER_GIB << 30
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
