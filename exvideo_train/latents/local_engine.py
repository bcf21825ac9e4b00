"""Encoding on the devices of one machine: a process a device with its own decoders, and who feeds and watches them.

The engine deals clips out one at a time, to whoever asks: a slow device or long clips take fewer. Between it and an
encoding process goes

    ("ready",)                        the models are loaded
    ("want",)                         a decoder is free; answered with a record, or None when no clip is left
    ("began", clip_id)                this clip may kill the process
    ("settled", clip_id, totals)      it is written or quarantined
    ("finished", totals)
    ("error", message)                what the user can repair; ends the run

Axis letters: C channel, T latent frames, F video frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.workers import Failure, exit_with_parent
from exvideo_train.errors import UserError
from exvideo_train.latents.clip_file import IndexEntry
from exvideo_train.latents.decode import ATTEMPTS_AFTER_DEATH, Decoded, decode_clips
from exvideo_train.latents.encode_report import Totals
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.latents.store import LatentStore, Quarantine, is_settled, quarantine_clip

if TYPE_CHECKING:
    from torch import Tensor

    from exvideo_train.models.stages import TextEncoder, VideoEncoder

# Clips of equal captions are dealt out side by side; decoding returns them slightly out of order.
CAPTIONS_KEPT = 32
WRITES_AHEAD = 2
# A clip in work when an encoder dies is tried once more, then left out.
DEATHS_A_CLIP = 2
# Encoders of a device that die this often without finishing a clip in between: not the clips' fault. Three clips
# side by side that kill their encoders are still within it.
DEATHS_IN_A_ROW = 4 * DEATHS_A_CLIP
# The same for those that had no clip in work, which no clip can explain.
DEATHS_WITHOUT_CLIP = 4
WATCH_SECONDS = 1.0


# -- in an encoding process ---------------------------------------------------------------------------------


class ClipEncoder:
    """The encoders of one process: frames and a caption -> what the store keeps."""

    def __init__(self, settings: EncodeSettings, device: str) -> None:
        import torch

        if device == "cpu":
            # Threads that wait for each other on cores taken by decoding cost 40 times more than they bring.
            torch.set_num_threads(max(1, torch.get_num_threads() - settings.decode_workers))
        number_format = settings.options.encoder_dtype.value
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[number_format]
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

        try:
            return _on_cpu(self._video.tensors(frames_FHWC, fps))
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise UserError(
                f"the GPU's memory is too small to encode {tuple(frames_FHWC.shape[:3])} frames: set tiling=true, "
                f"or choose a smaller geometry ({str(error).split('.')[0]})"
            ) from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Torch's own error, or what cuDNN says when its workspace does not fit."""
    import torch

    cudnn = ("CUDNN_STATUS_ALLOC_FAILED", "unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in cudnn)


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


# -- beside them ---------------------------------------------------------------------------------------------


class ClipQueue:
    """Clips that no encoder has yet.

    An encoder keeps a caption's embedding, so neighbours of one caption go to one encoder, and T5 runs once: until the
    others have nothing else left, as all are to end at about the same time.
    """

    def __init__(self, records: Sequence[ClipRecord]) -> None:
        same_caption = groupby(records, key=lambda record: record.caption)
        self._free = deque(deque(neighbours) for _, neighbours in same_caption)
        self._reserved: dict[int, deque[ClipRecord]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._free)) + sum(map(len, self._reserved.values()))

    def take(self, encoder: int) -> ClipRecord | None:
        """A clip for an encoder; None if there is none left."""
        mine = self._reserved.setdefault(encoder, deque())
        while not mine and self._free:
            mine.extend(self._free.popleft())
        if not mine:
            largest = max(self._reserved.values(), key=len)
            mine.extendleft([largest.pop() for _ in range((len(largest) + 1) // 2)])
        return mine.popleft() if mine else None

    def give_back(self, encoder: int, records: Iterable[ClipRecord] = ()) -> None:
        """An encoder is gone: its clips in work, and what was reserved for it, come first."""
        self._free.appendleft(deque([*records, *self._reserved.pop(encoder, ())]))


class EncodersDied(UserError):
    """Every device of this machine has been given up."""


@dataclass
class _EncoderProcess:
    """An encoding process.

    Attributes:
        in_work: clips given to it and not settled yet, by id.
        current: the one that it encodes.
        heard: when it last said something, on the monotonic clock.
    """

    number: int
    device: str
    process: Any
    connection: Connection
    in_work: dict[str, ClipRecord] = field(default_factory=dict)
    current: ClipRecord | None = None
    totals: Totals = field(default_factory=Totals)
    finished: bool = False
    heard: float = field(default_factory=time.monotonic)
    hung: bool = False


class LocalEngine:
    """Runs one encoding process a device until every clip is settled; those that die or hang are replaced.

    Args:
        settings: how clips are encoded.
        devices: torch device names, one process each.
        records: the clips; those of equal captions side by side.
        on_progress: called with each settled clip's id.
    """

    def __init__(
        self,
        settings: EncodeSettings,
        devices: Sequence[str],
        records: Sequence[ClipRecord],
        on_progress: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.devices = list(devices)
        self.clips = ClipQueue(records)
        self.on_progress = on_progress
        self.totals: list[Totals] = []
        self._events: queue.Queue[tuple[_EncoderProcess, tuple[Any, ...] | None]] = queue.Queue()
        self._deaths: Counter[str] = Counter()
        # By device, the clip in work at each death since it last finished one.
        self._deaths_in_a_row: defaultdict[str, list[ClipRecord | None]] = defaultdict(list)
        self._num_started = 0
        self._running: list[_EncoderProcess] = []

    def run(self) -> None:
        """Encode every clip; without clips one encoder still writes the empty prompt.

        Raises:
            UserError: an encoder met a full disk or too little GPU memory, or all died again and again.
        """
        try:
            for device in self.devices[: max(1, len(self.clips))]:
                self._start(device)
            while self._running:
                self._kill_hanging()
                try:
                    encoder, message = self._events.get(timeout=WATCH_SECONDS)
                except queue.Empty:
                    continue
                if message is None:
                    self._ended(encoder)
                else:
                    self._handle(encoder, message)
        finally:
            self.stop()

    def stop(self) -> None:
        """Kill what still runs. Files are whole or absent, so nothing needs time to tidy up."""
        for encoder in self._running:
            encoder.process.kill()
            encoder.process.join()
            self.totals.append(encoder.totals)
        self._running = []

    def _start(self, device: str) -> None:
        self._num_started += 1
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=encoder_main, args=(theirs, self.settings, device))
        process.start()
        theirs.close()
        encoder = _EncoderProcess(self._num_started, device, process, ours)
        self._running.append(encoder)
        threading.Thread(target=self._listen, args=(encoder,), daemon=True).start()

    def _listen(self, encoder: _EncoderProcess) -> None:
        while True:
            try:
                self._events.put((encoder, encoder.connection.recv()))
            except (EOFError, OSError):
                self._events.put((encoder, None))
                return

    def _kill_hanging(self) -> None:
        """Its end then comes through its pipe, as any other death does."""
        for encoder in self._running:
            if not encoder.hung and time.monotonic() - encoder.heard > self._patience_seconds(encoder):
                encoder.hung = True
                encoder.process.kill()

    def _patience_seconds(self, encoder: _EncoderProcess) -> float:
        # Between two clips it may wait for a decoder that is at its own limit.
        waiting = encoder.current is None
        seconds = self.settings.seconds_to_encode(encoder.device)
        return seconds + ATTEMPTS_AFTER_DEATH * self.settings.options.clip_timeout_seconds * waiting

    def _handle(self, encoder: _EncoderProcess, message: tuple[Any, ...]) -> None:
        encoder.heard = time.monotonic()
        kind = message[0]
        if kind == "want":
            self._deal(encoder)
        elif kind == "began":
            encoder.current = encoder.in_work[message[1]]
        elif kind == "settled":
            encoder.totals = message[2]
            if encoder.in_work.pop(message[1]) is encoder.current:
                encoder.current = None
            self._deaths_in_a_row[encoder.device].clear()
            self.on_progress(message[1])
        elif kind == "finished":
            encoder.totals, encoder.finished = message[1], True
        elif kind == "error":
            raise UserError(message[1])

    def _deal(self, encoder: _EncoderProcess) -> None:
        record = self.clips.take(encoder.number)
        if record is not None:
            encoder.in_work[record.clip_id] = record
        # One that has died by now: its end, which comes next, gives the clip back.
        with suppress(OSError):
            encoder.connection.send(record)

    def _ended(self, encoder: _EncoderProcess) -> None:
        encoder.process.join()
        self._running.remove(encoder)
        self.totals.append(encoder.totals)
        encoder.connection.close()
        if encoder.finished:
            assert not encoder.in_work
        else:
            self._died(encoder)
        if len(self.clips) and not self._running:
            # Given back when the others had been told that nothing was left.
            self._start(self.devices[0])

    def _died(self, encoder: _EncoderProcess) -> None:
        cause = f"exit code {encoder.process.exitcode}"
        if encoder.hung:
            cause = f"killed after {self._patience_seconds(encoder):g} s without a sign of life"
        deaths = self._deaths_in_a_row[encoder.device]
        deaths.append(encoder.current)
        is_given_up = len(deaths) >= DEATHS_IN_A_ROW or deaths.count(None) >= DEATHS_WITHOUT_CLIP
        if encoder.current is not None and not is_given_up:
            self._blame(encoder.current, cause)
        self._give_back(encoder.number, encoder.in_work.values())
        if is_given_up:
            self._give_up(encoder.device, cause)
            return
        print(f"note: the encoder on {encoder.device} died ({cause}) and is replaced", flush=True)
        self._start(encoder.device)

    def _give_back(self, number: int, records: Iterable[ClipRecord]) -> None:
        # It may have written a clip and died before it said so.
        store = LatentStore.open(self.settings.store_path)
        quarantine = Quarantine(store.path, self.settings.geometry)
        self.clips.give_back(number, [record for record in records if not is_settled(store, quarantine, record)])

    def _give_up(self, device: str, cause: str) -> None:
        """Go on without a device whose encoders all die; clips that were blamed for it are let go."""
        deaths = self._deaths_in_a_row.pop(device)
        quarantine = Quarantine(self.settings.store_path, self.settings.geometry)
        for record in deaths:
            if record is not None and record.clip_id in self._deaths:
                if record.clip_id in quarantine:
                    quarantine.remove(record.clip_id)
                    self.clips.give_back(0, [record])
                del self._deaths[record.clip_id]
        self.devices.remove(device)
        if not self.devices:
            raise EncodersDied(
                f"the encoder on {device} died {len(deaths)} times without finishing a clip ({cause}); its messages "
                "above say why. Less memory: tiling=true, or fewer decode_workers; a clip may take as long as "
                "encode_timeout_seconds"
            )
        print(
            f"warning: {device} is given up: its encoders died {len(deaths)} times without finishing a clip ({cause})",
            flush=True,
        )

    def _blame(self, record: ClipRecord, cause: str) -> None:
        self._deaths[record.clip_id] += 1
        if self._deaths[record.clip_id] < DEATHS_A_CLIP:
            return
        store = LatentStore.open(self.settings.store_path)
        failure = Failure("encoder_died", f"its encoder died {DEATHS_A_CLIP} times ({cause})")
        quarantine_clip(store, Quarantine(store.path, self.settings.geometry), record, failure)
