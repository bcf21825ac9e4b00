"""The clips still to encode, shared by all encoding processes of all machines through the store's file system.

    reports/work/todo/<000>/<number>.jsonl                blocks of clip records that nobody has taken
    reports/work/taken/<number>.jsonl@<owner>             blocks in work; the owner touches them as a sign of life

A block is taken by renaming it, which one process alone can do. A block whose owner shows no sign of life goes back
to todo. Taking one twice is harmless: latent files are immutable and equal whoever writes them.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from exvideo_train.clips.record import ClipRecord, read_manifest
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_text

BLOCKS_A_FOLDER = 1000
LARGEST_BLOCK = 64
HEARTBEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0


class WorkList:
    """Blocks of clips to encode, in ``<store>/reports/work``."""

    def __init__(self, store_path: Path) -> None:
        self.folder = store_path / "reports" / "work"
        self.todo = self.folder / "todo"
        self.taken = self.folder / "taken"
        self._size_path = self.folder / "block_size"

    def create(self, records: Sequence[ClipRecord], num_encoders: int) -> None:
        """Replace the list; blocks are small enough that encoders end at about the same time."""
        self.remove()
        try:
            self.taken.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write {self.taken}: {error.strerror}; free space, then run again") from error
        size = max(1, min(LARGEST_BLOCK, len(records) // (16 * num_encoders)))
        num_blocks = 0
        for block in _cut_into_blocks(records, size):
            lines = [record.to_json() + "\n" for record in block]
            shard = f"{num_blocks // BLOCKS_A_FOLDER:03d}"
            atomic_write_text(self.todo / shard / f"{num_blocks:08d}.jsonl", "".join(lines))
            num_blocks += 1
        atomic_write_text(self._size_path, str(len(records) / max(1, num_blocks)))

    def remove(self) -> None:
        """Delete the list."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            raise UserError(f"{self.folder} cannot be deleted; make the latents folder writable")

    def take(self, owner: str) -> Path | None:
        """Take a block: the lowest in number that is free, None when there is none."""
        for path in self._free():
            target = self.taken / f"{path.name}@{owner}"
            try:
                path.rename(target)
                # The rename keeps the old modification time, which would look like a silent owner.
                os.utime(target)
                return target
            except FileNotFoundError:
                continue
        return None

    def _free(self) -> Iterator[Path]:
        if not self.todo.is_dir():
            return
        for shard in sorted(self.todo.iterdir()):
            yield from sorted(shard.glob("[!.]*.jsonl"))

    def records(self, block: Path) -> list[ClipRecord]:
        """Records of a taken block."""
        return list(read_manifest(block))

    def finish(self, block: Path) -> None:
        """Every clip of the block is written or quarantined."""
        block.unlink(missing_ok=True)

    def give_back(self, owner: str) -> int:
        """Return the blocks of an owner that has died; returns how many."""
        blocks = list(self.taken.glob(f"*@{owner}")) if self.taken.is_dir() else []
        return sum(self._give_back(block) for block in blocks)

    def give_back_silent(self, probe: Path) -> int:
        """Return the blocks whose owners have shown no sign of life; returns how many.

        Args:
            probe: a file that is touched to learn the file system's own time; hosts' clocks differ.
        """
        probe.touch()
        now = probe.stat().st_mtime
        returned = 0
        for block in list(self.taken.iterdir()) if self.taken.is_dir() else []:
            try:
                silent = now - block.stat().st_mtime > SILENCE_SECONDS
            except FileNotFoundError:
                continue
            if silent:
                returned += self._give_back(block)
        return returned

    def _give_back(self, block: Path) -> int:
        name = block.name.split("@", 1)[0]
        target = self.todo / f"{int(name.split('.')[0]) // BLOCKS_A_FOLDER:03d}" / name
        try:
            block.rename(target)
        except FileNotFoundError:
            return 0
        return 1

    def counts(self) -> tuple[int, int]:
        """(blocks free, blocks in work)."""
        return sum(1 for _ in self._free()), sum(1 for _ in self.taken.iterdir()) if self.taken.is_dir() else 0

    def num_unsettled(self) -> int:
        """Clips in blocks that are not finished, about: blocks differ in size."""
        return round(sum(self.counts()) * float(self._size_path.read_text()))


def _cut_into_blocks(records: Sequence[ClipRecord], size: int) -> Iterator[list[ClipRecord]]:
    """Blocks of about ``size``, at most twice that; neighbours of one caption stay in one block where they fit.

    An encoder keeps a caption's embedding: in two blocks they may be two encoders' clips, and T5 runs twice.
    """
    block: list[ClipRecord] = []
    for _, neighbours in groupby(records, key=lambda record: record.caption):
        same = list(neighbours)
        while len(block) + len(same) > 2 * size:
            room = size - len(block)
            yield block + same[:room]
            block, same = [], same[room:]
        block += same
        if len(block) >= size:
            yield block
            block = []
    if block:
        yield block


class Heartbeat:
    """Touches an owner's blocks from a thread as long as the process lives."""

    def __init__(self, work: WorkList, owner: str) -> None:
        self._work, self._owner = work, owner
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            for block in self._work.taken.glob(f"*@{self._owner}"):
                # Given back or finished in between: nothing to keep alive.
                try:
                    os.utime(block)
                except FileNotFoundError:
                    continue
