"""What happens in an encoding process: frames and caption become what the store keeps, and are written beside it.

Axis letters: F video frames, H height, W width.
"""

from __future__ import annotations

import signal
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.workers import Failure, exit_with_parent
from exvideo_train.errors import UserError
from exvideo_train.latents.clip_file import IndexEntry
from exvideo_train.latents.decode import Decoded, decode_clips
from exvideo_train.latents.encode_report import Totals
from exvideo_train.latents.quarantine import Quarantine, quarantine_clip
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.latents.store import LatentStore

if TYPE_CHECKING:
    from torch import Tensor

    from exvideo_train.models.stages import TextEncoder, VideoEncoder

# Clips of equal captions are dealt out side by side; decoding returns them slightly out of order.
CAPTIONS_KEPT = 32
WRITES_AHEAD = 2


class ClipEncoder:
    """The encoders of one process: frames and a caption -> what the store keeps."""

    def __init__(self, settings: EncodeSettings, device: str) -> None:
        import torch

        from exvideo_train.devices import cudnn_is_sound, cudnn_version
        from exvideo_train.models.stages import torch_dtype

        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            if not cudnn_is_sound():
                print(
                    f"warning: {device}: torch has loaded cuDNN {cudnn_version()}; up to 9.15.0 it has no fast kernels "
                    "for the VAE in bf16: another cuDNN on LD_LIBRARY_PATH may hide torch's own",
                    flush=True,
                )
        if device == "cpu":
            # Threads that wait for each other on cores taken by decoding cost 40 times more than they bring.
            torch.set_num_threads(max(1, torch.get_num_threads() - settings.decode_workers))
        dtype = torch_dtype(settings.options.encoder_dtype.value)
        family, text_length = settings.family, settings.fingerprint.text_length
        self._text: TextEncoder | None = None
        if family.text_encoder is not None:
            self._text = family.text_encoder()(settings.model_path, device, dtype, text_length)
        tiling = settings.options.tiling
        self._video: VideoEncoder = family.video_encoder()(settings.model_path, device, dtype, tiling)
        self._embeddings: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def caption_tensors(self, caption: str) -> dict[str, Tensor]:
        """What is stored of a caption, on the CPU; the last ones are kept."""
        if self._text is None:
            return {}
        if caption not in self._embeddings:
            self._embeddings[caption] = _on_cpu(self._text.tensors(caption))
            if len(self._embeddings) > CAPTIONS_KEPT:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(caption)
        return self._embeddings[caption]

    def num_tokens_cut(self, caption: str) -> int:
        """Tokens at the caption's end that its embedding does not hold."""
        return self._text.num_tokens_cut(caption) if self._text is not None else 0

    def frame_tensors(self, frames_FHWC: Tensor, fps: float) -> dict[str, Tensor]:
        """What is stored of a clip's frames, on the CPU.

        Raises:
            UserError: the device's memory is too small.
        """
        from exvideo_train.models.stages import is_out_of_memory

        try:
            return _on_cpu(self._video.tensors(frames_FHWC, fps))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"the GPU's memory is too small to encode {tuple(frames_FHWC.shape[:3])} frames: set tiling=true, "
                f"or choose a smaller geometry ({str(error).split('.')[0]})"
            ) from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def not_finite(frame_tensors: dict[str, Tensor], caption_tensors: dict[str, Tensor]) -> Failure | None:
    """A failure if an encoder gave infinities or NaNs, which training must never see."""
    for tensors, encoder in ((frame_tensors, "the VAE"), (caption_tensors, "the text encoder")):
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            remedy = "encoder_dtype=bf16 has more range than fp16"
            return Failure("not_finite", f"{encoder} gave infinite or NaN values; {remedy}")
    return None


class EncodeLoop:
    """Encodes clips and writes them; ``report`` is told of each, as a message to the engine."""

    def __init__(self, settings: EncodeSettings, report: Callable[[tuple[object, ...]], None]) -> None:
        self.settings = settings
        self.report = report
        self.store = LatentStore.open(settings.store_path)
        self.quarantine = Quarantine(settings.store_path, settings.geometry)
        self.totals = Totals()

    def run(self, encoder: ClipEncoder, records: Iterable[ClipRecord]) -> None:
        """Encode until there are no more records.

        Raises:
            UserError: the disk is full or not writable, or the GPU's memory is too small.
        """
        if self.store.lacks_empty_prompt():
            self.store.write_empty_prompt(encoder.caption_tensors(""))
        settings = self.settings
        workers, prefetch = settings.decode_workers, settings.options.prefetch_clips
        writes: deque[tuple[ClipRecord, Future[tuple[int, float]]]] = deque()
        began = waited_since = time.monotonic()
        with ThreadPoolExecutor(1) as writer:
            for decoded in decode_clips(records, settings.decode_options, workers, prefetch):
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
        self.report(("began", record.clip_id))
        began = time.monotonic()
        of_caption = encoder.caption_tensors(record.caption)
        of_frames = encoder.frame_tensors(decoded.frames_FHWC, record.sampling_fps or self.settings.geometry.fps)
        failure = not_finite(of_frames, of_caption)
        self.totals.encode_seconds += time.monotonic() - began
        if failure is not None:
            self._settle_failure(record, failure)
            return
        write = partial(
            self.store.write_clip,
            record.clip_id,
            self.settings.geometry,
            {**of_frames, **of_caption},
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
        self.report(("settled", record.clip_id, self.totals))


def _timed(write: Callable[[], IndexEntry]) -> tuple[int, float]:
    """Bytes written, and seconds."""
    began = time.monotonic()
    return write().num_bytes, time.monotonic() - began


def dealt_records(connection: Connection) -> Iterator[ClipRecord]:
    """Clips as the engine deals them out."""
    while True:
        connection.send(("want",))
        record: ClipRecord | None = connection.recv()
        if record is None:
            return
        yield record


def encoder_main(connection: Connection, settings: EncodeSettings, device: str) -> None:
    """Main function of an encoding process."""
    # Ctrl-C reaches the whole group of processes: the coordinator decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    _silence_loading_bars()
    try:
        encoder = ClipEncoder(settings, device)
        connection.send(("ready",))
        loop = EncodeLoop(settings, connection.send)
        loop.run(encoder, dealt_records(connection))
        connection.send(("finished", loop.totals))
    except UserError as error:
        connection.send(("error", str(error)))


def _silence_loading_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
