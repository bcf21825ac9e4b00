"""Rows of a data set in the order of a manifest: SQLite sorts more of them than memory holds."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from exvideo_train.clips.record import ClipRecord
from exvideo_train.errors import UserError

# A clip as it is sorted: by video, so that each is opened once, then by span. Two clips with one id are always
# neighbours; the id depends on the data set's span, which a cut video's record no longer shows.
ClipRow = tuple[bytes, int, int, str, str]
_WITHOUT_END = 10**15
_CACHE_KIB = 16 << 10


def clip_row(record: ClipRecord) -> ClipRow:
    """Video, start and end in milliseconds, id, JSON; names of files may be no UTF-8."""
    start_ms = round(record.start_seconds * 1000)
    end_ms = _WITHOUT_END if record.end_seconds is None else round(record.end_seconds * 1000)
    return record.video.encode("utf-8", "surrogatepass"), start_ms, end_ms, record.clip_id, record.to_json()


class SortedRows:
    """Clips and dropped rows, added in any order, read in one: by code points, whoever found them first.

    Args:
        path: of a file in a folder of its own, which takes what sorting needs too and is for the caller to remove.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._told():
            self._connection = sqlite3.connect(path, isolation_level=None)
            # Only a run that comes to its end needs what is in it. Sorting is not to fill the system's own /tmp.
            for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
                self._connection.execute(f"PRAGMA {setting}")
            folder = str(path.parent.absolute()).replace("'", "''")
            self._connection.execute(f"PRAGMA temp_store_directory = '{folder}'")
            self._connection.execute("CREATE TABLE clips (video, start_ms, end_ms, clip_id, content)")
            self._connection.execute("CREATE TABLE dropped (line)")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(f"cannot use {self._path}: {error}; free space, then run again") from None

    def add(self, clips: Iterable[ClipRow], dropped: Iterable[str]) -> None:
        """Raises UserError: the disk is full."""
        with self._told():
            self._connection.execute("BEGIN")
            self._connection.executemany("INSERT INTO clips VALUES (?, ?, ?, ?, ?)", clips)
            self._connection.executemany("INSERT INTO dropped VALUES (?)", ((line,) for line in dropped))
            self._connection.execute("COMMIT")

    def clips(self) -> Iterator[tuple[bytes, str, str]]:
        """(video, id, JSON), sorted."""
        with self._told():
            yield from self._connection.execute(
                "SELECT video, clip_id, content FROM clips ORDER BY video, start_ms, end_ms, clip_id, content"
            )

    def dropped(self) -> Iterator[str]:
        """Lines, sorted."""
        with self._told():
            for (line,) in self._connection.execute("SELECT line FROM dropped ORDER BY line"):
                yield line

    def close(self) -> None:
        self._connection.close()
