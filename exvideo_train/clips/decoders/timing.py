"""When the frames of a video are shown: the tolerances that every decoder goes by, and what wrong timestamps are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from exvideo_train.clips.container import Reason, UnreadableClip, open_video, stream_duration

if TYPE_CHECKING:
    import av.container
    import av.video.stream

# Timestamps are rounded to milliseconds in WebM and in data sets' spans; a moment may miss its frame by that much.
TIME_TOLERANCE_SECONDS = 0.0015
# From the span's start on. More than frames in the wrong order, and longer than anything that is worth a clip.
STEP_BACK_SECONDS = 0.5
LEAP_SECONDS = 60.0
# After a seek that landed too late (MPEG-TS, broken indexes) step back this much further, and at last to the start.
SEEK_BACK_SECONDS = (0.0, 3.0, 20.0, math.inf)


def check_order(video: str, start: float, previous: float, moment: float) -> None:
    """Refuse a frame whose time leaps ahead of its predecessor's, or from the span's start on falls behind it.

    Args:
        video: named in the error.
        start: where the span begins, in seconds from the video's first frame like all of them.
        previous: time of the frame before, minus infinity for the first.
        moment: time of the frame.

    Raises:
        UnreadableClip: bad timestamps.
    """
    leaps = math.isfinite(previous) and moment > max(start, previous) + LEAP_SECONDS
    if leaps or start <= previous > moment + STEP_BACK_SECONDS:
        raise UnreadableClip(
            Reason.BAD_TIMESTAMPS, f"{video} has a frame at {moment:.2f} s after one at {previous:.2f} s"
        )


def seek_to(seconds: float, container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> bool:
    """Go to the last key frame not after so many seconds from the video's first frame; False if its format cannot."""
    import av

    if not stream.time_base:
        return False
    try:
        container.seek((stream.start_time or 0) + int(seconds / stream.time_base), stream=stream, backward=True)
    except (av.FFmpegError, OSError, OverflowError):
        return False
    return True


def check_start(video: str, start: float, length: float | None) -> None:
    """Refuse a span that begins after the end of its video of `length` seconds, if that is known.

    Raises:
        UnreadableClip: the span is past the end.
    """
    if length is not None and start > length + 1.0:
        raise UnreadableClip(Reason.SPAN_PAST_END, f"{video} of {length:.2f} s ends before {start:.2f} s")


def why_ended(video: str, moments: list[float]) -> UnreadableClip:
    """The video's frames ran out before the last moment: say whether the file, the span or the clip is at fault."""
    with open_video(video) as (container, stream):
        promised = stream_duration(container, stream)
    if promised is not None and promised > moments[-1] + 0.5:
        detail = f"{video} promises {promised:.2f} s but its frames end before {moments[-1]:.2f} s"
        return UnreadableClip(Reason.TRUNCATED, detail)
    length = "" if promised is None else f" of {promised:.2f} s"
    if moments[0] > 0:
        return UnreadableClip(
            Reason.SPAN_PAST_END, f"{video}{length} ends before {moments[-1]:.2f} s, which the span needs"
        )
    return UnreadableClip(Reason.TOO_SHORT, f"{video}{length} is shorter than the {moments[-1]:.2f} s needed")
