"""What turns a video and moments into frames: a function a decoder, all of one signature, by the option's name.

Axis letters: H height, W width, C channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from exvideo_train.clips.decoders import decord, pyav

if TYPE_CHECKING:
    import numpy as np


class Decoder(Protocol):
    """The frames shown at ascending `moments`, in seconds from the video's first frame."""

    def __call__(
        self, video: str, moments: list[float], height: int, width: int, num_threads: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Upright, centre-cropped to the aspect asked for, antialiased.

        Args:
            video: path, or ``shard.tar::member``.
            moments: at least one.
            height, width: of the frames.
            num_threads: decoder threads, 0 for one a core.

        Yields:
            (index of the moment, uint8 RGB frame of shape (H, W, C)); a frame shown at several moments comes several
            times.

        Raises:
            UnreadableClip: the video cannot be opened or decoded, or ends before the last moment.
            NotForDecord: decord cannot be given the clip, which may be well.
        """


DECODERS: dict[str, Decoder] = {"decord": decord.iter_frames, "pyav": pyav.iter_frames}
