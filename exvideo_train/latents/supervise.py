"""The encoding processes of one machine: started, watched, replaced when they die."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from exvideo_train.clips.record import ClipRecord
from exvideo_train.clips.workers import Failure
from exvideo_train.errors import UserError
from exvideo_train.latents.decode import ATTEMPTS_AFTER_DEATH
from exvideo_train.latents.encode_worker import Totals, encoder_main
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.latents.store import LatentStore, Quarantine, quarantine_clip
from exvideo_train.latents.work import WorkList

# A clip in work when an encoder dies is tried once more, then left out.
DEATHS_A_CLIP = 2
# Encoders of a device that die this often without finishing a clip in between: not the clips' fault. Three clips
# side by side that kill their encoders are still within it.
DEATHS_IN_A_ROW = 4 * DEATHS_A_CLIP
# The same for those that had no clip in work, which no clip can explain.
DEATHS_WITHOUT_CLIP = 4
WATCH_SECONDS = 1.0


class EncodersDied(UserError):
    """Every device of this process has been given up."""


@dataclass
class _Encoder:
    """An encoding process; ``heard`` is when it last said something, on the monotonic clock."""

    device: str
    owner: str
    process: Any
    connection: Connection
    current_clip: ClipRecord | None = None
    totals: Totals = field(default_factory=Totals)
    finished: bool = False
    heard: float = field(default_factory=time.monotonic)
    hung: bool = False


class Supervisor:
    """Runs one encoding process a device until the work list is empty.

    Args:
        settings: how clips are encoded.
        devices: torch device names, one process each.
        on_progress: called with each settled clip's id.
    """

    def __init__(
        self,
        settings: EncodeSettings,
        devices: Sequence[str],
        on_progress: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.devices = list(devices)
        self.on_progress = on_progress
        self.work = WorkList(settings.store_path)
        self.totals: list[Totals] = []
        self._events: queue.Queue[tuple[_Encoder, tuple[Any, ...] | None]] = queue.Queue()
        self._deaths: Counter[str] = Counter()
        # By device, the clip in work at each death since it last finished one.
        self._deaths_in_a_row: defaultdict[str, list[ClipRecord | None]] = defaultdict(list)
        self._num_started = 0
        self._running: list[_Encoder] = []

    def run(self) -> None:
        """Encode until no block is free; blocks of other machines may still be in work.

        Raises:
            UserError: an encoder met a full disk or too little GPU memory, or all died again and again.
        """
        try:
            num_blocks = max(1, self.work.counts()[0])
            for device in self.devices[:num_blocks]:
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
            self.work.give_back(encoder.owner)
        self._running = []

    def _start(self, device: str) -> None:
        self._num_started += 1
        owner = f"{socket.gethostname()}-{os.getpid()}-{self._num_started}"
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=encoder_main, args=(theirs, self.settings, device, owner))
        process.start()
        theirs.close()
        encoder = _Encoder(device, owner, process, ours)
        self._running.append(encoder)
        threading.Thread(target=self._listen, args=(encoder,), daemon=True).start()

    def _listen(self, encoder: _Encoder) -> None:
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

    def _patience_seconds(self, encoder: _Encoder) -> float:
        # Between two clips it may wait for a decoder that is at its own limit.
        waiting = encoder.current_clip is None
        seconds = self.settings.seconds_to_encode(encoder.device)
        return seconds + ATTEMPTS_AFTER_DEATH * self.settings.clip_timeout_seconds * waiting

    def _handle(self, encoder: _Encoder, message: tuple[Any, ...]) -> None:
        encoder.heard = time.monotonic()
        kind = message[0]
        if kind == "began":
            encoder.current_clip = message[1]
        elif kind == "settled":
            encoder.totals = message[2]
            if encoder.current_clip is not None and encoder.current_clip.clip_id == message[1]:
                encoder.current_clip = None
            self._deaths_in_a_row[encoder.device].clear()
            self.on_progress(message[1])
        elif kind == "finished":
            encoder.totals, encoder.finished = message[1], True
        elif kind == "error":
            raise UserError(message[1])

    def _ended(self, encoder: _Encoder) -> None:
        encoder.process.join()
        self._running.remove(encoder)
        self.totals.append(encoder.totals)
        encoder.connection.close()
        if encoder.finished:
            return
        cause = f"exit code {encoder.process.exitcode}"
        if encoder.hung:
            cause = f"killed after {self._patience_seconds(encoder):g} s without a sign of life"
        self.work.give_back(encoder.owner)
        deaths = self._deaths_in_a_row[encoder.device]
        deaths.append(encoder.current_clip)
        if len(deaths) >= DEATHS_IN_A_ROW or deaths.count(None) >= DEATHS_WITHOUT_CLIP:
            self._give_up(encoder.device, cause)
            return
        if encoder.current_clip is not None:
            self._blame(encoder.current_clip, cause)
        print(f"note: the encoder on {encoder.device} died ({cause}) and is replaced", flush=True)
        self._start(encoder.device)

    def _give_up(self, device: str, cause: str) -> None:
        """Go on without a device whose encoders all die; clips that were blamed for it are let go."""
        deaths = self._deaths_in_a_row.pop(device)
        quarantine = Quarantine(self.settings.store_path, self.settings.geometry)
        for record in deaths:
            if record is not None and record.clip_id in self._deaths:
                quarantine.remove(record.clip_id)
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
        if not self._running:
            self._start(self.devices[0])

    def _blame(self, record: ClipRecord, cause: str) -> None:
        self._deaths[record.clip_id] += 1
        if self._deaths[record.clip_id] < DEATHS_A_CLIP:
            return
        store = LatentStore.open(self.settings.store_path)
        failure = Failure("encoder_died", f"its encoder died {DEATHS_A_CLIP} times ({cause})")
        quarantine_clip(store, Quarantine(store.path, self.settings.geometry), record, failure)
