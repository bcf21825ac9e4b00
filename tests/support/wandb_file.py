"""What an offline run of wandb has written: a log of records in LevelDB's format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER_BYTES, BLOCK_BYTES = 7, 32768
# Checksum, length, and whether a chunk is a whole record (1), or its first (2), a middle (3) or its last part (4).
CHUNK_HEADER = struct.Struct("<IHB")
WHOLE, LAST = 1, 4


def read_history(path: Path) -> list[dict[str, Any]]:
    """Logged values by name, one dictionary a step."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in _records(path.read_bytes())
        if record.WhichOneof("record_type") == "history"
    ]


def _records(content: bytes) -> Iterator[Record]:
    assert content[:4] == b":W&B"
    place, parts = FILE_HEADER_BYTES, list[bytes]()
    while place + CHUNK_HEADER.size <= len(content):
        left_in_block = BLOCK_BYTES - place % BLOCK_BYTES
        if left_in_block < CHUNK_HEADER.size:
            place += left_in_block
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(content, place)
        place += CHUNK_HEADER.size
        parts.append(content[place : place + length])
        place += length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record
