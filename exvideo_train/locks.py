"""One process at a time in a folder, on any file system, and free again whatever ends the holder.

    <path>/<token>.json     a record of one process: host, pid, since when; touched every few seconds as a sign of life

flock() would be shorter, and is not enough: network file systems forward it to their server, keep it to the one
machine, or refuse it, each by a mount option (NFS ``local_lock``, Lustre ``localflock`` or none, most of FUSE), and
children forked by a holder keep it after its death. What all of them do is to create a file, to list a folder and to
keep times by one clock. So a process first writes its own record, then looks for others: of two that start together at
least one sees the other, on whatever machines. Whether a holder still lives is asked of the kernel where it is the same
one, so that kill -9 is known at once; elsewhere its record must have been touched within a minute. After the crash of a
machine the next holder on another one waits for a minute at most, and nobody has to delete anything.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from exvideo_train.errors import UserError

SIGN_OF_LIFE_SECONDS = 5.0
# Twelve signs of life that did not come.
SILENCE_SECONDS = 60.0
LOOK_AGAIN_SECONDS = 0.5
TAKEN_OVER_STATUS = 2
_MAX_RECORD_BYTES = 4096
_MAX_TEXT = 100


class Held(UserError):
    """Another process holds the lock."""


@contextmanager
def hold(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold a lock until the block is left or the process ends, however it ends.

    Args:
        path: the lock's folder, made and removed here: inside what is protected, or beside it. When it is deleted
            under a living holder, that one ends itself.
        what: begins the error's message: the option and its value, like ``run_dir=/runs/a``.
        remedy: ends it: what the user can do instead.

    Raises:
        Held: another process holds it, named by host and pid.
        UserError: the folder cannot be written.
    """
    try:
        record = _claim(path, what, remedy)
    except OSError as error:
        raise UserError(
            f"{what}: cannot write {path}: {error.strerror or error}; make it writable, free space or choose another"
        ) from error
    stop = threading.Event()
    thread = threading.Thread(target=_show_life, args=(record, what, stop), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _withdraw(record)


@dataclass(frozen=True)
class _Record:
    """A process that holds the lock or asks for it; without a place, its content cannot be read (yet)."""

    path: Path
    touched: float
    host: str = "?"
    pid: int = 0
    place: str = ""
    start: str = ""
    since: str = "?"

    def runs(self) -> bool | None:
        """Whether the process runs; None where this machine's kernel cannot tell."""
        return _runs(self.pid, self.start) if self.place and self.place == _place() else None

    def __str__(self) -> str:
        return f"process {self.pid or '?'} on {self.host} (since {self.since})"


def _claim(path: Path, what: str, remedy: str) -> Path:
    """Returns this process's record, once there is no other."""
    seen: dict[Path, float] = {}
    is_told = False
    while True:
        mine = _write_record(path)
        others = _others(mine)
        if not others:
            return mine
        _withdraw(mine)
        for other in others:
            # Who only asks has withdrawn before the second look. Whom no kernel here knows, has died if it is silent.
            if other.path in seen and (other.runs() or other.touched != seen[other.path]):
                raise Held(f"{what}: {other} is at work in it; {remedy}")
            if other.path in seen and not is_told:
                print(
                    f"{what}: {other} was at work in it; waiting {SILENCE_SECONDS:g} s for a sign of life", flush=True
                )
                is_told = True
            seen.setdefault(other.path, other.touched)
        time.sleep(LOOK_AGAIN_SECONDS * (1 + random.random()))


def _write_record(path: Path) -> Path:
    content = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "place": _place(),
        "start": _start(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    record = path / f"{secrets.token_hex(8)}.json"
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            record.write_text(json.dumps(content) + "\n")
        except FileNotFoundError:
            # Another process has withdrawn and removed the folder in between.
            continue
        # By the server's clock, where there is one; a write may set the time by this machine's.
        os.utime(record)
        return record


def _others(mine: Path) -> list[_Record]:
    """The records of other processes that may live; those of the dead are removed."""
    now = mine.stat().st_mtime
    others = []
    for path in mine.parent.glob("*.json"):
        record = _read_record(path) if path != mine else None
        if record is None:
            continue
        runs = record.runs()
        if runs or (runs is None and now - record.touched <= SILENCE_SECONDS):
            others.append(record)
        else:
            path.unlink(missing_ok=True)
    return others


def _read_record(path: Path) -> _Record | None:
    try:
        # Opening makes NFS ask its server; stat alone may be answered with what was true a minute ago.
        with open(path, "rb") as stream:
            touched = os.fstat(stream.fileno()).st_mtime
            text = stream.read(_MAX_RECORD_BYTES)
    except FileNotFoundError:
        return None
    try:
        content: Any = json.loads(text)
        pid = content["pid"] if isinstance(content["pid"], int) else 0
        host, place, start, since = (_printable(content[key]) for key in ("host", "place", "start", "since"))
    except (ValueError, LookupError, TypeError, RecursionError):
        return _Record(path, touched)
    return _Record(path, touched, host, pid, place, start, since)


def _printable(value: Any) -> str:
    text = str(value)[:_MAX_TEXT]
    return text if text.isprintable() else ascii(text)


def _withdraw(record: Path) -> None:
    record.unlink(missing_ok=True)
    # While other processes' records are in it, it stays: the last one removes it.
    with suppress(OSError):
        record.parent.rmdir()


def _show_life(record: Path, what: str, stop: threading.Event) -> None:
    while not stop.wait(SIGN_OF_LIFE_SECONDS):
        try:
            os.utime(record)
        except FileNotFoundError:
            # Whoever held this process for dead may be at work already: not even a checkpoint may be written now.
            print(
                f"error: {what}: this process's lock {record} is gone: deleted, or taken over after "
                f"{SILENCE_SECONDS:g} s without a sign of life; ending before two processes write into one folder",
                file=sys.stderr,
                flush=True,
            )
            os._exit(TAKEN_OVER_STATUS)
        except OSError as error:
            # A hiccup of a network disk; the next sign comes in time.
            print(f"warning: {record}: {error.strerror or error}", file=sys.stderr, flush=True)


@cache
def _place() -> str:
    """Where process ids mean the same: this boot of this kernel, and the container; empty where that is unknown."""
    try:
        # A container may show another one's /proc.
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _runs(pid: int, start: str) -> bool | None:
    """Whether the process that started then runs here; None when that is hidden."""
    if not 0 < pid < 2**31:
        return None
    try:
        # Another user's process exists, and most systems show when it started.
        with suppress(PermissionError):
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    now = _start(pid)
    return None if now is None else now == start


def _start(pid: int) -> str | None:
    """When a process started, in ticks since boot; empty for one that has ended and waits for its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        return None
