"""Frames decoded by decord: the same moments as PyAV's, with decord's own conversion of colours.

decord is given the packets of the span alone, copied by PyAV from the key frame before it on, and reads them from the
first to the last. Given the whole file it would index all of it first, and then count frames in the order of their
packets: after a seek its frame n is another than the n-th shown, in MPEG-TS and wherever frames that are decoded
after a key frame are shown before it (x265's default).

Axis letters: H height, W width, C channel.
"""

from __future__ import annotations

import bisect
import io
import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np

from exvideo_train.clips.container import Reason, UnreadableClip, first_frame, opened, quarter_turn
from exvideo_train.clips.decoders.resize import crop_and_resize
from exvideo_train.clips.decoders.span_packets import SpanPart, copy_span
from exvideo_train.clips.decoders.timing import TIME_TOLERANCE_SECONDS, why_ended

# With more threads decord loses their packets ("Error sending packet").
_MOST_THREADS = {"vp9": 1, "av1": 4}
_WHERE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")


def iter_frames(
    video: str, moments: list[float], height: int, width: int, num_threads: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """A `Decoder`."""
    most_threads = num_threads or os.cpu_count() or 1
    span = copy_span(video, moments[0], moments[-1], max_parts=most_threads)
    if moments[-1] >= span.until - TIME_TOLERANCE_SECONDS:
        raise why_ended(video, moments)
    begins = [part.times[0] for part in span.parts]
    part_of = [max(bisect.bisect_right(begins, moment + TIME_TOLERANCE_SECONDS) - 1, 0) for moment in moments]
    if span.codec in _MOST_THREADS:
        num_threads = min(_MOST_THREADS[span.codec], max(1, most_threads // len(span.parts)))
    sideways = _turn(video, span.parts[0]) in (90, 270)
    pixel_aspect = 1 / span.pixel_aspect if sideways else span.pixel_aspect

    def read(number: int, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        reader = _Reader(video, span.parts[number], num_threads)
        left = iter(indices)
        for frame_HWC, num_moments in reader.frames_at([moments[index] for index in indices]):
            resized_HWC = crop_and_resize(frame_HWC, height, width, pixel_aspect)
            for index in itertools.islice(left, num_moments):
                yield index, resized_HWC

    work = [(number, list(indices)) for number, indices in itertools.groupby(range(len(moments)), part_of.__getitem__)]
    if len(work) == 1:
        yield from read(*work[0])
        return
    with ThreadPoolExecutor(len(work)) as threads:
        for frames in threads.map(lambda task: list(read(*task)), work):
            yield from frames


def _turn(video: str, part: SpanPart) -> int:
    """By how many degrees the part's first frame is turned: frames tell, not files."""
    with opened(video, io.BytesIO(part.content)) as (container, stream):
        return quarter_turn(first_frame(video, container, stream).rotation)


class _Reader:
    """decord on a part of a span, read forwards."""

    def __init__(self, video: str, part: SpanPart, num_threads: int) -> None:
        self._decord = load_decord()
        self._video, self._times = video, part.times
        self._next = 0
        source = io.BytesIO(part.content)
        try:
            # decord hands out the frame before in place of one that is damaged, unless told how many it may.
            self._reader = self._decord.VideoReader(source, num_threads=num_threads, fault_tol=1e-9)
            self._key_frames: list[int] = self._reader.get_key_indices()
        except (self._decord.DECORDError, RuntimeError) as error:
            raise self._damaged(error) from None

    def frames_at(self, moments: list[float]) -> Iterator[tuple[np.ndarray, int]]:
        """The frames shown at ascending moments; all of the part is decoded.

        They come at full size: decord converts frames that nobody wants, until it is told not to, and at full size
        that costs far less than its resize.

        Yields:
            (uint8 RGB frame of shape (H, W, C), at how many of the moments it is shown).

        Raises:
            UnreadableClip: decord finds damage, or fewer frames than the part has packets.
        """
        numbers = [max(bisect.bisect_right(self._times, moment + TIME_TOLERANCE_SECONDS) - 1, 0) for moment in moments]
        last = len(self._times) - 1
        try:
            self._skip_to(numbers[0])
            for number, following in itertools.pairwise([*dict.fromkeys(numbers), last]):
                frame = self._take()
                # At once: until told that it may skip them, decord converts the frames that come next.
                self._skip_to(following)
                yield _unpadded(frame.asnumpy()), numbers.count(number)
            # A packet without a picture would shift all frames after it: then there are too few.
            if self._next == last:
                self._take()
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
        message = _WHERE.sub("", (str(error).strip().splitlines() or ["its frames end early"])[0])
        return UnreadableClip(
            Reason.CORRUPT,
            f"{self._video} after {self._times[max(self._next - 1, 0)]:.2f} s: decord: {message} "
            "(decoder=pyav reads some clips that decord takes for damaged)",
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
