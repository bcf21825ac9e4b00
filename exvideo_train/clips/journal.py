"""What has been found out about files so far, kept on disk so that a killed run goes on where it stopped.

SQLite holds it: a lookup needs no memory, and a kill at any moment loses at most the last seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from exvideo_train.clips.container import PASSING_REASONS, split_video
from exvideo_train.clips.workers import Failure, parallel_map
from exvideo_train.errors import UserError

_COMMIT_SECONDS = 2.0
_TABLE = "CREATE TABLE found (key TEXT PRIMARY KEY, stamp TEXT, content TEXT)"

Task = TypeVar("Task")
Found = TypeVar("Found")
Companion = TypeVar("Companion")


def file_stamp(video: str) -> str:
    """Changes when the video's file does; empty when there is none."""
    try:
        status = os.stat(split_video(video)[0])
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _as_key(key: str) -> str | bytes:
    """A key as SQLite takes it: the names of some files are not UTF-8."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return key.encode("utf-8", "surrogatepass")
    return key


class Journal:
    """Texts by key, each valid for one stamp. A context manager; leaving it commits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._committed = time.monotonic()
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path)
            # The journal is a saving, not a record: a lost tail is found out again, so no wait for the disk.
            self._connection.execute("PRAGMA synchronous = OFF")
            # Checked before anything is written: a database of this name may be somebody's own.
            tables = dict(self._connection.execute("SELECT name, sql FROM sqlite_master"))
            tables.pop("sqlite_autoindex_found_1", None)
            if tables not in ({}, {"found": _TABLE}):
                raise self._user_error(f"a database of another program or version ({', '.join(sorted(tables))})")
            if not tables:
                self._connection.execute(_TABLE)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise self._user_error(error) from None

    def _user_error(self, error: object) -> UserError:
        return UserError(f"cannot use {self._path}: {error}; free space, or delete it to begin anew")

    def get(self, key: str, stamp: str, read: Callable[[str], Found]) -> Found | None:
        """What `read` makes of the text noted for this key, if the stamp is still the same.

        Raises:
            UserError: the journal is damaged, or `read` raises an error that says so.
        """
        with self._told():
            row = self._connection.execute("SELECT stamp, content FROM found WHERE key = ?", (_as_key(key),)).fetchone()
        try:
            return read(row[1]) if row and row[0] == stamp else None
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise self._user_error(f"what it holds about {key!r} cannot be read ({error})") from None

    def put(self, key: str, stamp: str, content: str) -> None:
        """Note a text."""
        with self._told():
            self._connection.execute("INSERT OR REPLACE INTO found VALUES (?, ?, ?)", (_as_key(key), stamp, content))
            if time.monotonic() - self._committed > _COMMIT_SECONDS:
                self._connection.commit()
                self._committed = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._connection.commit()
        except sqlite3.Error as failure:
            # An error under way is the one to tell; the journal loses its last seconds, as by a kill.
            if error is None:
                raise self._user_error(failure) from None
        finally:
            self._connection.close()


def journaled_map(
    function: Callable[[Task], Found],
    entries: Iterable[tuple[Companion, str, str, Task | None]],
    journal_path: Path,
    read: Callable[[str], Found],
    num_workers: int,
    timeout_seconds: float,
    **options: int,
) -> Iterator[tuple[Companion, Found | Failure | None]]:
    """`parallel_map` over what no earlier run has found out, in the order of the entries.

    Args:
        function: gives a dataclass, which is noted as JSON unless its `reason` is one that passes.
        entries: (what belongs to it, key in the journal, video, task) each; without a task there is nothing to find.
        read: what `function` gave, from that JSON.
        num_workers, timeout_seconds, options: see `parallel_map`.

    Yields:
        (what belongs to an entry, what was found or why nothing was).
    """
    waiting: deque[tuple[Companion, str, str, Found | None]] = deque()
    with Journal(journal_path) as journal:

        def tasks() -> Iterator[Task | None]:
            for companion, key, video, task in entries:
                stamp = file_stamp(video)
                known = None if task is None else journal.get(key, stamp, read)
                waiting.append((companion, key, stamp, known))
                # No task costs nothing, and keeps the order of what is known already.
                yield None if known is not None else task

        results = parallel_map(partial(_if_any, function), tasks(), num_workers, timeout_seconds, **options)
        for task, found in results:
            companion, key, stamp, known = waiting.popleft()
            if found is not None and getattr(found, "reason", "") not in PASSING_REASONS:
                journal.put(key, stamp, json.dumps(dataclasses.asdict(found)))  # type: ignore[arg-type]
            yield companion, known if task is None else found


def _if_any(function: Callable[[Task], Found], task: Task | None) -> Found | None:
    """One worker's task."""
    return None if task is None else function(task)
