"""Metadata text files read in pieces: JSON lines and CSV, never whole in memory."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from exvideo_train.clips.sources.base import RawRows
from exvideo_train.errors import UserError

# One worker's task. Larger pieces make longer sorted runs, smaller ones less memory a worker.
PIECE_BYTES = 4 << 20


def json_line_pieces(path: Path) -> Iterator[RawRows]:
    """Lines of a JSON-lines file as (line number, text), in pieces of about `PIECE_BYTES`."""
    rows: list[tuple[int, str]] = []
    size = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            size += len(line)
            if line.strip():
                rows.append((number, line.decode("utf-8", errors="replace")))
            if size >= PIECE_BYTES:
                yield RawRows(str(path), rows, size)
                rows, size = [], 0
    if size:
        yield RawRows(str(path), rows, size)


def csv_pieces(path: Path, required: tuple[str, ...]) -> Iterator[RawRows]:
    """Rows of a CSV with a header as (line number, {column: text}), in pieces of about `PIECE_BYTES`.

    Raises:
        UserError: a required column is missing.
    """
    # Panda-70M puts all captions of a source video into one field.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, "rb") as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace", newline="")
        reader = csv.DictReader(text)
        columns = reader.fieldnames or []
        absent = [name for name in required if name not in columns]
        if absent:
            raise UserError(
                f"metadata={path} has no column {', '.join(absent)} (it has: {', '.join(columns)[:300]}); "
                "is it the CSV that this source expects?"
            )
        rows: list[tuple[int, dict[str, str]]] = []
        done = 0
        while True:
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise UserError(f"metadata={path} line {reader.line_num}: {error}; download it again") from None
            rows.append((reader.line_num, row))
            # Positions are those of the read buffer: exact enough for a progress bar and for bounding a piece.
            if len(rows) % 256 == 0 and binary.tell() - done >= PIECE_BYTES:
                yield RawRows(str(path), rows, binary.tell() - done)
                rows, done = [], binary.tell()
        if rows:
            yield RawRows(str(path), rows, binary.tell() - done)
