"""Encoding on the devices of one machine: a process a device with its own decoders, and who feeds and watches them.

The engine deals clips out one at a time, to whoever asks: a slow device or long clips take fewer. Between it and an
encoding process (:mod:`exvideo_train.latents.encoder`) goes

    ("ready",)                        the models are loaded
    ("want",)                         a decoder is free; answered with a record, or None when no clip is left
    ("began", clip_id)                this clip may kill the process
    ("settled", clip_id, totals)      it is written or quarantined
    ("finished", totals)
    ("error", message)                what the user can repair; ends the run
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing.connection import Connection
from typing import Any

from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.workers import Failure
from exvideo_train.errors import UserError
from exvideo_train.latents.decode import ATTEMPTS_AFTER_DEATH
from exvideo_train.latents.encode_report import Totals
from exvideo_train.latents.encoder import encoder_main
from exvideo_train.latents.quarantine import Quarantine, is_settled, quarantine_clip
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.latents.store import LatentStore

# A clip in work when an encoder dies is tried once more, then left out.
DEATHS_A_CLIP = 2
# Encoders of a device that die this often without finishing a clip in between: not the clips' fault. Three clips
# side by side that kill their encoders are still within it.
DEATHS_IN_A_ROW = 4 * DEATHS_A_CLIP
# The same for those that had no clip in work, which no clip can explain.
DEATHS_WITHOUT_CLIP = 4
WATCH_SECONDS = 1.0


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
        # It may have written a clip and died before it said so.
        store = LatentStore.open(self.settings.store_path)
        quarantine = Quarantine(store.path, self.settings.geometry)
        left = [record for record in encoder.in_work.values() if not is_settled(store, quarantine, record)]
        self.clips.give_back(encoder.number, left)
        if is_given_up:
            self._give_up(encoder.device, cause)
            return
        print(f"note: the encoder on {encoder.device} died ({cause}) and is replaced", flush=True)
        self._start(encoder.device)

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
