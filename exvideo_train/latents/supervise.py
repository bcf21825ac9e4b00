"""The encoding processes of one machine: started, watched, replaced when they die."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from exvideo_train.clips.record import ClipRecord
from exvideo_train.errors import UserError
from exvideo_train.latents.decode import Failure
from exvideo_train.latents.encode_worker import Totals, encoder_main, quarantine_clip
from exvideo_train.latents.plan import EncodeSettings
from exvideo_train.latents.quarantine import Quarantine
from exvideo_train.latents.store import LatentStore
from exvideo_train.latents.work import WorkList

# A clip in work when an encoder dies is tried once more, then left out.
DEATHS_A_CLIP = 2
# Encoders that die this often without finishing a clip in between: not the clips' fault.
DEATHS_IN_A_ROW = 4


@dataclass
class _Encoder:
    device: str
    owner: str
    process: Any
    connection: Connection
    current_clip: ClipRecord | None = None
    totals: Totals = field(default_factory=Totals)
    finished: bool = False


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
        self._deaths_in_a_row = 0
        self._num_started = 0
        self._running: list[_Encoder] = []

    def run(self) -> None:
        """Encode until no block is free; blocks of other machines may still be in work.

        Raises:
            UserError: an encoder met a full disk, too little GPU memory, or died again and again.
        """
        try:
            num_blocks = max(1, self.work.counts()[0])
            for device in self.devices[:num_blocks]:
                self._start(device)
            while self._running:
                encoder, message = self._events.get()
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

    def _handle(self, encoder: _Encoder, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "began":
            encoder.current_clip = message[1]
        elif kind == "settled":
            encoder.totals = message[2]
            if encoder.current_clip is not None and encoder.current_clip.clip_id == message[1]:
                encoder.current_clip = None
            self._deaths_in_a_row = 0
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
        self._deaths_in_a_row += 1
        code = encoder.process.exitcode
        print(f"note: the encoder on {encoder.device} died (exit code {code}) and is replaced", flush=True)
        if self._deaths_in_a_row >= DEATHS_IN_A_ROW:
            raise UserError(
                f"the encoder on {encoder.device} died {DEATHS_IN_A_ROW} times without finishing a clip (exit code "
                f"{code}); its messages above say why. Less memory: tiling=true, or fewer decode_workers"
            )
        if encoder.current_clip is not None:
            self._blame(encoder.current_clip, code)
        self.work.give_back(encoder.owner)
        self._start(encoder.device)

    def _blame(self, record: ClipRecord, code: int | None) -> None:
        self._deaths[record.clip_id] += 1
        if self._deaths[record.clip_id] < DEATHS_A_CLIP:
            return
        store = LatentStore.open(self.settings.store_path)
        failure = Failure("encoder_died", f"its encoder died {DEATHS_A_CLIP} times (exit code {code})")
        quarantine_clip(store, Quarantine(store.path, self.settings.geometry), record, failure)
