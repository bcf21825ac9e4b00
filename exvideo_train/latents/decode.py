"""Decoding ahead of the encoder, in processes that may die or hang without taking anything with them.

Axis letters: C channel, F video frames, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.workers import Failure, Worker, map_by
from exvideo_train.geometry import Geometry

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# One more try when a process dies: the system's out-of-memory killer picks them whatever they were reading.
ATTEMPTS_AFTER_DEATH = 2


@dataclass(frozen=True)
class Decoded:
    """A clip's frames, uint8 (F, H, W, C), or the failure.

    Attributes:
        decord_refusal: why PyAV read the clip although decord was to, None if it did not.
    """

    record: ClipRecord
    frames_FHWC: Tensor | None
    failure: Failure | None
    seconds: float
    decord_refusal: str | None = None


@dataclass(frozen=True)
class DecodeOptions:
    """How a worker decodes.

    Attributes:
        timeout_seconds: wall-clock time a clip may take before its worker is killed.
        recycle_after: clips after which a worker is replaced, so that a decoder's leaks cannot grow.
        decoder: ``decord``, with PyAV for what it cannot be given, or ``pyav``.
    """

    geometry: Geometry
    timeout_seconds: float
    recycle_after: int
    decoder: str = "decord"


class DecodeWorker(Worker[ClipRecord, "tuple[np.ndarray, str | None] | Failure"]):
    """One decoding process, replaced when it dies, hangs or has served its time."""

    def __init__(self, options: DecodeOptions) -> None:
        super().__init__(
            partial(_read, options.geometry, options.decoder),
            options.timeout_seconds,
            options.recycle_after,
            attempts=ATTEMPTS_AFTER_DEATH,
            prepare=partial(_load, options.decoder),
        )

    def decode(self, record: ClipRecord) -> Decoded:
        """Frames of one clip, or why not; never raises for what a clip does."""
        import torch

        began = time.monotonic()
        result = self(record)
        seconds = time.monotonic() - began
        if isinstance(result, Failure):
            return Decoded(record, None, result, seconds)
        frames_FHWC, decord_refusal = result
        return Decoded(record, torch.from_numpy(frames_FHWC), None, seconds, decord_refusal)


def _load(decoder: str) -> None:
    """Before the first clip's time begins to run: on a busy machine these take longer than a clip."""
    import av  # noqa: F401
    import torch

    from exvideo_train.clips.decoders.decord import load_decord

    torch.set_num_threads(1)
    if decoder == "decord":
        load_decord()


def _read(geometry: Geometry, decoder: str, record: ClipRecord) -> tuple[np.ndarray, str | None] | Failure:
    from exvideo_train.clips.container import UnreadableClip
    from exvideo_train.clips.reader import read_clip

    try:
        frames_FHWC, decord_refusal = read_clip(record, geometry, num_threads=1, decoder=decoder)
    except UnreadableClip as error:
        return Failure(error.reason, error.detail)
    # Any error that reading one clip raises is that clip's failure and ends up in the report.
    except Exception as error:  # noqa: BLE001
        return Failure("decoder_error", f"{type(error).__name__}: {error}")
    return frames_FHWC.numpy(), decord_refusal


def decode_clips(
    records: Iterable[ClipRecord], options: DecodeOptions, num_workers: int, prefetch: int
) -> Iterator[Decoded]:
    """Decoded clips as they become ready, in no particular order, ahead of whoever consumes them.

    Args:
        options: how a worker decodes.
        num_workers: processes.
        prefetch: decoded clips that may wait; with those in work they bound the memory.
    """
    make_worker = partial(DecodeWorker, options)
    done = map_by(make_worker, DecodeWorker.decode, records, num_workers, num_workers + max(1, prefetch), False)
    return (decoded for _, decoded in done)
