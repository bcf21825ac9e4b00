"""Metadata text files read in pieces: JSON lines and CSV, never whole in memory.

No row takes more than `MAX_LINE_BYTES`, whatever its file lacks: line breaks, or the quote that closes a field.
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from exvideo_train.clips.bounds import MAX_LINE_BYTES
from exvideo_train.clips.sources.base import MALFORMED_ROW, Dropped, RawRows
from exvideo_train.errors import UserError

# One worker's task, whose clips, several times as large, wait in the parent's memory.
PIECE_BYTES = 1 << 20
MAX_ROW_LINES = 256
"""Of one row of a CSV: a quote that is not closed by then is taken for a mistake, and its line alone dropped."""
_BOM = b"\xef\xbb\xbf"


class _BadRow(ValueError):
    """Lines that cannot be a row."""


def json_line_pieces(path: Path) -> Iterator[RawRows]:
    """Lines of a JSON-lines file as (line number, text), in pieces of about `PIECE_BYTES`."""
    piece = RawRows(str(path), [], 0)
    size = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
            size += len(line)
            if len(line) > MAX_LINE_BYTES:
                size += _skip_line(stream, line)
                piece.dropped.append(Dropped(MALFORMED_ROW, _too_long("line"), f"{path}:{number}"))
            elif line.strip():
                content = line.removeprefix(_BOM) if number == 1 else line
                piece.rows.append((number, content.decode("utf-8", errors="replace")))
            if size >= PIECE_BYTES:
                yield RawRows(str(path), piece.rows, size, piece.dropped)
                piece, size = RawRows(str(path), [], 0), 0
    if size:
        yield RawRows(str(path), piece.rows, size, piece.dropped)


def _skip_line(stream: BinaryIO | TextIO, read: bytes | str) -> int:
    """Read to the end of a line of which the beginning has been read; returns the length of the rest."""
    size = 0
    ends = (b"\n",) if isinstance(read, bytes) else ("\n", "\r")
    while read and not read.endswith(ends):  # type: ignore[arg-type]
        read = stream.readline(1 << 16)
        size += len(read)
    return size


def _too_long(what: str) -> str:
    return f"a {what} of more than {MAX_LINE_BYTES:,} bytes"


def csv_pieces(path: Path, required: tuple[str, ...]) -> Iterator[RawRows]:
    """Rows of a CSV with a header as (number of their first line, {column: text}), in pieces of about `PIECE_BYTES`.

    Raises:
        UserError: a required column is missing.
    """
    # Panda-70M puts all captions of a source video into one field.
    csv.field_size_limit(MAX_LINE_BYTES)
    with open(path, "rb") as binary:
        lines = _Lines(io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace", newline=""))
        reader = csv.reader(lines)
        columns = _header(reader, path)
        absent = [name for name in required if name not in columns]
        if absent:
            raise UserError(
                f"metadata={path} has no column {', '.join(absent)} (it has: {', '.join(columns)[:300]}); "
                "is it the CSV that this source expects?"
            )
        piece, done = RawRows(str(path), [], 0), 0
        while True:
            lines.begin_row()
            try:
                fields = next(reader)
            except StopIteration:
                break
            except (csv.Error, _BadRow) as error:
                piece.dropped.append(Dropped(MALFORMED_ROW, str(error), f"{path}:{lines.first}"))
                lines.give_back()
                continue
            if len(lines.taken) > 1 and not _is_one_row(lines.taken):
                detail = "a quote that is not closed, or only by one of another row"
                piece.dropped.append(Dropped(MALFORMED_ROW, detail, f"{path}:{lines.first}"))
                lines.give_back()
            elif len(fields) > len(columns) and any(fields[len(columns) :]):
                detail = f"{len(fields)} fields for {len(columns)} columns; is a comma not in quotes?"
                piece.dropped.append(Dropped(MALFORMED_ROW, detail, f"{path}:{lines.first}"))
            elif fields:
                # A row may be short of columns: what needs one of them says so.
                piece.rows.append((lines.first, dict(zip(columns, fields, strict=False))))
            if lines.size >= PIECE_BYTES:
                # Positions are those of the read buffer: exact enough for a progress bar.
                yield RawRows(str(path), piece.rows, binary.tell() - done, piece.dropped)
                piece, done, lines.size = RawRows(str(path), [], 0), binary.tell(), 0
        if piece.rows or piece.dropped:
            yield RawRows(str(path), piece.rows, binary.tell() - done, piece.dropped)


def _is_one_row(lines: list[str]) -> bool:
    """Whether lines are one row by the letter: a stray quote makes one of several, and is closed before no comma."""
    try:
        return len(list(csv.reader(lines, strict=True))) == 1
    except csv.Error:
        return False


def _header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        return next(reader, [])
    except (csv.Error, _BadRow) as error:
        raise UserError(f"metadata={path}: its first line is not the header of a CSV: {error}") from None


class _Lines:
    """Lines for `csv.reader`, which takes as many as its row has: all to the end of the file after a stray quote."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._returned: deque[str] = deque()
        self.taken: list[str] = []
        """The row's lines so far."""
        self._taken_size = 0
        self._number = 0
        self.first = 1
        """Number of the row's first line."""
        self.size = 0
        """Letters read; whoever counts them sets it back."""

    def begin_row(self) -> None:
        """What is taken from now on belongs to the next row."""
        self.first = self._number + 1
        self.taken.clear()
        self._taken_size = 0

    def give_back(self) -> None:
        """Take all of the row's lines but its first for rows to come."""
        rest = self.taken[1:]
        self._returned.extendleft(reversed(rest))
        self._number -= len(rest)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._returned:
            line = self._returned.popleft()
        else:
            line = self._stream.readline(MAX_LINE_BYTES + 1)
            self.size += len(line)
            if len(line) > MAX_LINE_BYTES:
                self.size += _skip_line(self._stream, line)
                line += "\n"
        if not line:
            if self.taken:
                raise _BadRow("a quote that is not closed up to the end of the file")
            raise StopIteration
        self._number += 1
        self.taken.append(line)
        self._taken_size += len(line)
        if self._taken_size > MAX_LINE_BYTES:
            raise _BadRow(_too_long("row"))
        if len(self.taken) > MAX_ROW_LINES:
            raise _BadRow(f"a quote that is not closed within {MAX_ROW_LINES} lines")
        return line
