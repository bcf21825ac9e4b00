"""One encoding process: T5 and the VAE on one device, fed by decoding processes, writing into the store.

Axis letters: C channel, T latent frames, F video frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import signal
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from exvideo_train.clips.record import ClipRecord
from exvideo_train.errors import UserError
from exvideo_train.latents.clip_file import IndexEntry
from exvideo_train.latents.decode import Decoded, DecodePool, Failure, exit_with_parent
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.latents.store import LatentStore, Quarantine, is_settled, quarantine_clip
from exvideo_train.latents.work import Heartbeat, WorkList

if TYPE_CHECKING:
    from torch import Tensor

# Clips of equal captions are neighbours in the work list; decoding returns them slightly out of order.
CAPTIONS_KEPT = 32
WRITES_AHEAD = 2


@dataclass
class Totals:
    """What one or several encoding processes did, in clips, bytes and seconds of wall time.

    Attributes:
        decode_seconds: inside decoding processes, several at a time.
        encode_seconds: T5 and VAE.
        wait_seconds: the encoder had no decoded clip; the first clip's decoding is in startup_seconds instead.
        write_seconds: writing files, beside the encoder.
        loop_seconds: from the first decoded clip to the end.
    """

    num_encoded: int = 0
    num_bytes: int = 0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    write_seconds: float = 0.0
    startup_seconds: float = 0.0
    loop_seconds: float = 0.0
    quarantined: Counter[str] = field(default_factory=Counter)


class ClipEncoder:
    """T5 and the VAE of one process: frames and a caption -> what the store keeps."""

    def __init__(self, settings: EncodeSettings, device: str) -> None:
        import torch

        from exvideo_train.models.cogvideox.encoders import TextEncoder, VideoEncoder

        if device == "cpu":
            # Threads that wait for each other on cores taken by decoding cost 40 times more than they bring.
            torch.set_num_threads(max(1, torch.get_num_threads() - settings.decode_workers))
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[settings.dtype]
        self._text = TextEncoder(settings.model_path, device, dtype, settings.text_length)
        self._video = VideoEncoder(settings.model_path, device, dtype, settings.tiling)
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    def text(self, caption: str) -> Tensor:
        """Embedding (L, C) of a caption on the CPU; the last ones are kept."""
        if caption not in self._embeddings:
            # One at a time: a caption's last bits must not depend on what it shares a batch with.
            self._embeddings[caption] = self._text.encode([caption])[0].cpu()
            if len(self._embeddings) > CAPTIONS_KEPT:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(caption)
        return self._embeddings[caption]

    def num_tokens_cut(self, caption: str) -> int:
        """Tokens at the caption's end that its embedding does not hold."""
        return self._text.num_tokens_cut(caption)

    def moments(self, frames_FHWC: Tensor) -> Tensor:
        """Moments (2C, T, H, W) on the CPU.

        Raises:
            UserError: the device's memory is too small.
        """

        try:
            return self._video.encode(frames_FHWC).cpu()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError(
                f"the GPU's memory is too small to encode {tuple(frames_FHWC.shape[:3])} frames: set tiling=true, "
                f"or choose a smaller geometry ({str(error).split('.')[0]})"
            ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Torch's own error, or what cuDNN says when its workspace does not fit."""
    import torch

    cudnn = ("CUDNN_STATUS_ALLOC_FAILED", "unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in cudnn)


def not_finite(moments_CTHW: Tensor, text_LC: Tensor) -> Failure | None:
    """A failure if the VAE or T5 gave infinities or NaNs, which training must never see."""
    for tensor, encoder in ((moments_CTHW, "the VAE"), (text_LC, "the text encoder")):
        if not tensor.isfinite().all():
            remedy = "encoder_dtype=bf16 has more range than fp16"
            return Failure("not_finite", f"{encoder} gave infinite or NaN values; {remedy}")
    return None


class EncodeLoop:
    """Takes blocks of clips until none is left."""

    def __init__(self, settings: EncodeSettings, owner: str, report: Callable[[tuple[object, ...]], None]) -> None:
        self.settings = settings
        self.owner = owner
        self.report = report
        self.store = LatentStore.open(settings.store_path)
        self.quarantine = Quarantine(settings.store_path, settings.geometry)
        self.work = WorkList(settings.store_path)
        self.totals = Totals()
        self._open_clips: Counter[Path] = Counter()
        self._block_of: dict[str, Path] = {}

    def run(self, encoder: ClipEncoder) -> None:
        """Encode until the work list is empty.

        Raises:
            UserError: the disk is full or not writable, or the GPU's memory is too small.
        """
        if not self.store.empty_prompt_path.exists():
            self.store.write_empty_prompt(encoder.text(""))
        settings = self.settings
        pool = DecodePool(settings.decode_options, settings.decode_workers, settings.prefetch_clips)
        writes: deque[tuple[ClipRecord, Future[tuple[int, float]]]] = deque()
        began = waited_since = time.monotonic()
        with Heartbeat(self.work, self.owner), ThreadPoolExecutor(1) as writer:
            for decoded in pool.decode(self._records()):
                now = time.monotonic()
                if self.totals.decode_seconds == 0:
                    self.totals.startup_seconds = now - began
                    began = now
                else:
                    self.totals.wait_seconds += now - waited_since
                self.totals.decode_seconds += decoded.seconds
                # What is written is reported before the next clip, which may kill this process.
                while writes and (len(writes) > WRITES_AHEAD or writes[0][1].done()):
                    self._settle_write(*writes.popleft())
                self._encode(decoded, encoder, writer, writes)
                waited_since = time.monotonic()
                self.totals.loop_seconds = waited_since - began
            while writes:
                self._settle_write(*writes.popleft())
            self.totals.loop_seconds = time.monotonic() - began

    def _records(self) -> Iterator[ClipRecord]:
        while (block := self.work.take(self.owner)) is not None:
            records = [
                record for record in self.work.records(block) if not is_settled(self.store, self.quarantine, record)
            ]
            self._open_clips[block] = len(records)
            if not records:
                self.work.finish(block)
            for record in records:
                self._block_of[record.clip_id] = block
                yield record

    def _encode(
        self,
        decoded: Decoded,
        encoder: ClipEncoder,
        writer: ThreadPoolExecutor,
        writes: deque[tuple[ClipRecord, Future[tuple[int, float]]]],
    ) -> None:
        record = decoded.record
        if decoded.frames_FHWC is None:
            assert decoded.failure is not None
            self._settle_failure(record, decoded.failure)
            return
        self.report(("began", record))
        began = time.monotonic()
        text_LC = encoder.text(record.caption)
        moments_CTHW = encoder.moments(decoded.frames_FHWC)
        failure = not_finite(moments_CTHW, text_LC)
        self.totals.encode_seconds += time.monotonic() - began
        if failure is not None:
            self._settle_failure(record, failure)
            return
        write = partial(
            self.store.write_clip,
            record.clip_id,
            self.settings.geometry,
            moments_CTHW,
            text_LC,
            record.caption,
            sampling_fps=record.sampling_fps,
            num_tokens_cut=encoder.num_tokens_cut(record.caption),
            decord_refusal=decoded.decord_refusal,
        )
        writes.append((record, writer.submit(_timed, write)))

    def _settle_write(self, record: ClipRecord, write: Future[tuple[int, float]]) -> None:
        num_bytes, seconds = write.result()
        self.totals.num_encoded += 1
        self.totals.num_bytes += num_bytes
        self.totals.write_seconds += seconds
        self._settle(record)

    def _settle_failure(self, record: ClipRecord, failure: Failure) -> None:
        quarantine_clip(self.store, self.quarantine, record, failure)
        self.totals.quarantined[failure.reason] += 1
        self._settle(record)

    def _settle(self, record: ClipRecord) -> None:
        block = self._block_of.pop(record.clip_id)
        self._open_clips[block] -= 1
        if self._open_clips[block] == 0:
            del self._open_clips[block]
            self.work.finish(block)
        self.report(("settled", record.clip_id, self.totals))


def _timed(write: Callable[[], IndexEntry]) -> tuple[int, float]:
    """Bytes written, and seconds."""
    began = time.monotonic()
    return write().num_bytes, time.monotonic() - began


def encoder_main(connection: Connection, settings: EncodeSettings, device: str, owner: str) -> None:
    """Main function of an encoding process.

    It sends ("ready",), ("began", record) and ("settled", clip_id, totals) a clip, at last ("finished", totals), or
    ("error", message) for a mistake that the user can repair.
    """
    # Ctrl-C reaches the whole group of processes: the coordinator decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    _silence_loading_bars()
    try:
        encoder = ClipEncoder(settings, device)
        connection.send(("ready",))
        loop = EncodeLoop(settings, owner, connection.send)
        loop.run(encoder)
        connection.send(("finished", loop.totals))
    except UserError as error:
        connection.send(("error", str(error)))


def _silence_loading_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
