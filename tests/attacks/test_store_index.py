"""index.jsonl from strangers: training refuses it by its line, verification lists the line and writes it anew."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from support.attacked_store import (
    DEEP,
    GEOMETRY,
    findings,
)
from support.attacks import Attack, attacks, check_ending, dropped

from exvideo_train.errors import UserError
from exvideo_train.latents.inspection import describe_stats
from exvideo_train.latents.store import LatentStore
from exvideo_train.latents.verification import verify_store


def entry_line(**changes: Any) -> bytes:
    entry = {"geometry": GEOMETRY.name, "clip_id": "f" * 32, "num_bytes": 1, "sha256": "0" * 64, "caption_sha256": "0"}
    fields = {k: v for k, v in (entry | changes).items() if v is not ...}
    return json.dumps(fields).encode()


LINES = [
    dropped("half a line", b'{"clip_id": ', "line 7"),
    dropped("empty line", b"", "line 7"),
    dropped("a list", b"[]", "line 7", "[] is no JSON object"),
    dropped("null", b"null", "line 7"),
    dropped("a number", b"7", "line 7"),
    dropped("NaN", b"NaN", "line 7"),
    dropped("nested deep", DEEP[:60_000], "line 7"),
    dropped("a line of 200 kB", b"[" * 200_000, "line 7", "longer than"),
    dropped("not UTF-8", b"\xff\xfe{}", "line 7"),
    dropped("zeros", b"\0" * 100, "line 7"),
    dropped("id null", entry_line(clip_id=None), "line 7", "clip_id=None"),
    dropped("id a number", entry_line(clip_id=7), "line 7", "clip_id=7"),
    dropped("id that climbs", entry_line(clip_id="../../../../outside/precious"), "line 7", "clip_id='../"),
    dropped("id of 300 letters", entry_line(clip_id="a" * 300), "line 7", "clip_id='aaa"),
    dropped("id missing", entry_line(clip_id=...), "line 7", "clip_id is missing"),
    dropped("geometry a list", entry_line(geometry=[]), "line 7", "geometry=[]"),
    dropped("size a text", entry_line(num_bytes="1"), "line 7", "num_bytes='1'"),
    dropped("size negative", entry_line(num_bytes=-1), "line 7", "num_bytes=-1"),
    dropped(
        "size of 400 digits",
        entry_line(num_bytes=0).replace(b": 0,", b": %s," % (b"9" * 400)),
        "line 7",
        "num_bytes=9999",
    ),
    dropped("checksum null", entry_line(sha256=None), "line 7", "sha256=None"),
    dropped("rate infinite", entry_line(sampling_fps=math.inf), "line 7"),
    dropped("rate a text", entry_line(sampling_fps="8"), "line 7", "sampling_fps='8'"),
    dropped("tokens a list", entry_line(num_tokens_cut=[]), "line 7", "num_tokens_cut=[]"),
    dropped("unknown field", entry_line(extra=1), "line 7", "'extra'"),
    dropped("a clip again", b"AGAIN", "line 7", "earlier line"),
]


@attacks(LINES)
def test_line_of_the_index(attack: Attack, store: LatentStore) -> None:
    before = store.index_path.read_bytes()
    line = before.splitlines()[2] if attack.content == b"AGAIN" else attack.content
    store.index_path.write_bytes(before + line + b"\n")
    with pytest.raises(UserError, match=r"index.jsonl line 7 .*verify"):
        store.clip_ids(GEOMETRY)
    with pytest.raises(UserError, match=r"index.jsonl line 7 "):
        describe_stats(store, 3)
    check_ending(attack, lambda: findings(verify_store(store, repair=True, num_workers=1)))
    assert store.index_path.read_bytes() == before
    assert (store.path / "damaged" / "index.jsonl").read_bytes() == before + line + b"\n"
    assert verify_store(store, repair=False, num_workers=1).is_clean


def test_index_of_an_unknown_geometry_or_of_a_clip_that_is_gone(store: LatentStore) -> None:
    before = store.index_path.read_bytes()
    lines = [entry_line(geometry="../../outside"), entry_line(clip_id="e" * 32), entry_line()]
    store.index_path.write_bytes(before + b"\n".join(lines) + b"\n")
    found = verify_store(store, repair=True, num_workers=1)
    assert len(found.index_damage) == 1
    assert found.geometries[0].missing == ["e" * 32, "f" * 32]
    assert store.index_path.read_bytes() == before
