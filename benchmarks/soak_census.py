"""What a soak looks at, on Linux: the processes that it started in any depth, their memory, and what lies about.

Every process of a soak carries a mark in its environment, so that one that has lost its parent is still found.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MARK = "EXVIDEO_SOAK"
SHARED_MEMORY = Path("/dev/shm")
# Words of a command line, and what such a process is. The launcher's own come first: they name the script too.
KINDS = {
    "deepspeed.launcher.runner": "launcher",
    "deepspeed.launcher.launch": "node launcher",
    "launch/train.py": "rank",
    "encode_latents.py": "coordinator",
    "exvideo_train.sample": "sampling",
}
# What a process spawned by Python's multiprocessing is, by its parent.
SPAWNED = {"rank": "reader of data", "coordinator": "encoder", "encoder": "decoder"}


@dataclass(frozen=True)
class Marked:
    """A living process of the soak; ``part`` is what follows the soak's name in its mark."""

    process: psutil.Process
    part: str
    kind: str


def marked_processes(soak: str) -> list[Marked]:
    """All processes of a soak, whoever their parent is now; zombies have no environment and are not among them."""
    parts: dict[int, str] = {}
    processes: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            name, _, part = process.environ().get(MARK, "").partition(":")
        except psutil.Error:
            continue
        if name == soak:
            parts[process.pid], processes[process.pid] = part, process
    found = []
    for pid, process in processes.items():
        try:
            found.append(Marked(process, parts[pid], _kind(process, processes)))
        except psutil.Error:
            continue
    return found


def _kind(process: psutil.Process, processes: dict[int, psutil.Process]) -> str:
    words = process.cmdline()
    line = " ".join(words)
    if "resource_tracker" in line or "spawn_main" in line:
        parent = processes.get(process.ppid())
        of = _kind(parent, processes) if parent is not None else "nobody"
        if "resource_tracker" in line:
            return f"resource tracker of {of}"
        base, _, number = of.partition(" ")
        return f"{SPAWNED.get(base, f'child of {base}')} {number}".strip()
    for word, kind in KINDS.items():
        if word in line:
            return f"rank {process.environ().get('RANK')}" if kind == "rank" else kind
    return words[0] if words else "unknown"


def num_zombies(roots: Iterable[int]) -> int:
    """Ended descendants of these processes that nobody has waited for."""
    total = 0
    for root in roots:
        try:
            family = psutil.Process(root).children(recursive=True)
            total += sum(1 for process in family if process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            continue
    return total


def look_at(marked: Marked) -> dict[str, Any] | None:
    """Memory in bytes, descriptors and threads of one process; None when it has just ended."""
    process = marked.process
    try:
        memory = dict(_rollup(process.pid))
        return {
            "part": marked.part,
            "kind": marked.kind,
            # An id may be given again; with the time of its start it is one process.
            "process": f"{process.pid}@{process.create_time():.2f}",
            "rss": memory["Rss"],
            "anonymous": memory["Anonymous"],
            "pss": memory["Pss"],
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
        }
    except (psutil.Error, OSError, KeyError):
        # Gone between two looks, or ending: the memory of such a process is no longer there.
        return None


def _rollup(pid: int) -> Iterator[tuple[str, int]]:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        yield name, int(value.split()[0]) * 1024


def end_marked(soak: str, part: str | None = None) -> int:
    """Kill what is left of a soak, or of one part of it; returns how many there were."""
    left = [marked for marked in marked_processes(soak) if part is None or marked.part == part]
    for marked in left:
        try:
            # psutil knows a process by id and start: an id that was given to another is not signalled.
            marked.process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    return len(left)


def wait_until_gone(soak: str, part: str, seconds: float) -> list[str]:
    """Wait until a part has no processes; returns those that are left by then."""
    deadline = time.monotonic() + seconds
    while True:
        left = [f"{m.kind} {m.process.pid}" for m in marked_processes(soak) if m.part == part]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def shared_memory() -> dict[str, int]:
    """Names and bytes of the files in /dev/shm."""
    sizes = {}
    for path in SHARED_MEMORY.iterdir():
        try:
            sizes[path.name] = path.lstat().st_size
        except FileNotFoundError:
            continue
    return sizes


def shared_memory_left(before: Iterable[str]) -> dict[str, int]:
    """Files in /dev/shm that were not there before and that no process has open or mapped."""
    new = {name: size for name, size in shared_memory().items() if name not in set(before)}
    if not new:
        return {}
    held: set[str] = set()
    for process in psutil.process_iter():
        folder = Path(f"/proc/{process.pid}")
        try:
            held |= {line.rsplit("/", 1)[-1] for line in _mapped(folder)}
            held |= {os.path.basename(os.readlink(entry)) for entry in (folder / "fd").iterdir()}
        except OSError:
            # Of another user, or gone.
            continue
    return {name: size for name, size in new.items() if name not in held}


def _mapped(folder: Path) -> list[str]:
    return [line for line in (folder / "maps").read_text().splitlines() if str(SHARED_MEMORY) in line]


def files_below(folder: Path) -> dict[str, int]:
    """Relative names and bytes of everything in a folder that is no folder: files, sockets, links."""
    sizes: dict[str, int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            try:
                sizes[os.path.relpath(path, folder)] = os.lstat(path).st_size
            except FileNotFoundError:
                continue
    return sizes


def temporary_files(names: Iterable[str]) -> list[str]:
    """Of names, those that only an unfinished write has: see `exvideo_train.files.atomic_write`."""
    return [name for name in names if name.endswith(".tmp") or os.path.basename(name).startswith(".")]
