"""Latent files from strangers: one that was read and is wrong costs itself, by the name of the field; strays stay."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attacked_store import (
    GEOMETRY,
    RECORDS,
    VICTIM,
    findings,
    victim_path,
)
from support.attacks import Attack, attacks, check_ending, dropped, held

from exvideo_train.latents.clip_file import METADATA_KEY, CorruptLatent
from exvideo_train.latents.store import LatentStore
from exvideo_train.latents.verification import verify_store
from exvideo_train.training.dataset import LatentDataset
from exvideo_train.training.order import SampleOrder

# -- headers of latent files: each costs its own clip, by the name of the field ---------------------------------------


@dataclass
class File:
    """A latent file taken apart."""

    header: dict[str, Any]
    content: dict[str, Any]
    data: bytes

    @classmethod
    def read(cls, path: Path) -> File:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        return cls(header, json.loads(header.pop("__metadata__")[METADATA_KEY]), raw[8 + length :])

    def write(self, path: Path) -> None:
        text = json.dumps({"__metadata__": {METADATA_KEY: json.dumps(self.content)}, **self.header}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + self.data)


def saying(**fields: Any) -> Callable[[File], None]:
    """Fields of what the file says of itself; ... takes one away."""

    def change(file: File) -> None:
        file.content |= fields
        file.content = {name: value for name, value in file.content.items() if value is not ...}

    return change


def tensors(**changes: torch.Tensor | None) -> Callable[[File], None]:
    """Other tensors, with a checksum that fits them: only the schema can tell."""

    def change(file: File) -> None:
        from safetensors.torch import load, save

        from exvideo_train.latents.clip_file import tensors_digest

        text = json.dumps(file.header).encode()
        held_now = load(struct.pack("<Q", len(text)) + text + file.data) | changes
        new = {name: tensor for name, tensor in held_now.items() if tensor is not None}
        raw = save(new)
        (length,) = struct.unpack("<Q", raw[:8])
        file.header, file.data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        file.content["sha256"] = tensors_digest(new)

    return change


HEADERS = [
    dropped("no caption", saying(caption=...), VICTIM.clip_id, "caption is missing"),
    dropped("caption null", saying(caption=None), VICTIM.clip_id, "caption=None: must be text"),
    dropped("caption a number", saying(caption=7), VICTIM.clip_id, "caption=7: must be text"),
    dropped("caption a list", saying(caption=["a"]), VICTIM.clip_id, "caption=['a']"),
    dropped("caption with half a character", saying(caption="\ud83d"), VICTIM.clip_id, METADATA_KEY),
    dropped("caption of 20 MB", saying(caption="x" * 20_000_000), VICTIM.clip_id, "header of 20"),
    dropped("no checksum", saying(sha256=...), VICTIM.clip_id, "sha256 is missing"),
    dropped("checksum null", saying(sha256=None), VICTIM.clip_id, "sha256=None"),
    dropped("checksum a list", saying(sha256=[]), VICTIM.clip_id, "sha256=[]"),
    dropped("checksum short", saying(sha256="ab"), VICTIM.clip_id, "sha256='ab'"),
    dropped("checksum of another file", saying(sha256="0" * 64), VICTIM.clip_id, "checksum"),
    dropped("another clip", saying(clip_id=RECORDS[1].clip_id), VICTIM.clip_id, "clip_id is"),
    dropped("id that climbs", saying(clip_id="../../../x"), VICTIM.clip_id, "clip_id='../../../x'"),
    dropped("id with an escape", saying(clip_id="\x1b[31mred"), VICTIM.clip_id, r"\x1b[31mred"),
    dropped("another geometry", saying(geometry="49x480x720_8fps"), VICTIM.clip_id, "geometry is"),
    dropped("geometry an object", saying(geometry={}), VICTIM.clip_id, "geometry={}"),
    dropped("another fingerprint", saying(fingerprint="0" * 16), VICTIM.clip_id, "fingerprint is"),
    dropped("fingerprint missing", saying(fingerprint=...), VICTIM.clip_id, "fingerprint is missing"),
    dropped("rate 0", saying(sampling_fps=0), VICTIM.clip_id, "sampling_fps=0"),
    dropped("rate negative", saying(sampling_fps=-8.0), VICTIM.clip_id, "sampling_fps=-8.0"),
    dropped("rate a text", saying(sampling_fps="8"), VICTIM.clip_id, "sampling_fps='8'"),
    dropped("rate true", saying(sampling_fps=True), VICTIM.clip_id, "sampling_fps=True"),
    dropped("rate NaN", saying(sampling_fps=math.nan), VICTIM.clip_id, "NaN"),
    dropped("rate infinite", saying(sampling_fps=math.inf), VICTIM.clip_id, "Infinity"),
    dropped("rate of 400 digits", saying(sampling_fps=int("1" * 400)), VICTIM.clip_id, "digits"),
    dropped("tokens cut -1", saying(num_tokens_cut=-1), VICTIM.clip_id, "num_tokens_cut=-1"),
    dropped("tokens cut 1.5", saying(num_tokens_cut=1.5), VICTIM.clip_id, "num_tokens_cut=1.5"),
    dropped("refusal a number", saying(decord_refusal=3), VICTIM.clip_id, "decord_refusal=3"),
    dropped("says nothing", lambda file: setattr(file, "content", []), VICTIM.clip_id, "no JSON object"),
    dropped("no moments", tensors(moments=None), VICTIM.clip_id, "expected moments, text"),
    dropped("no text", tensors(text=None), VICTIM.clip_id, "expected moments, text"),
    dropped("a third tensor", tensors(extra=torch.zeros(2)), VICTIM.clip_id, "'extra'"),
    dropped(
        "moments of integers", tensors(moments=torch.zeros(4, 3, 4, 6).int()), VICTIM.clip_id, "moments: dtype='I32'"
    ),
    dropped("moments of booleans", tensors(moments=torch.zeros(4, 3, 4, 6).bool()), VICTIM.clip_id, "dtype='BOOL'"),
    dropped("moments of another float", tensors(moments=torch.zeros(4, 3, 4, 6).half()), VICTIM.clip_id, "dtype='F16'"),
    dropped("text of integers", tensors(text=torch.zeros(5, 6).long()), VICTIM.clip_id, "text: dtype='I64'"),
    dropped("moments a number", tensors(moments=torch.zeros(())), VICTIM.clip_id, "moments: shape=()"),
    dropped("moments empty", tensors(moments=torch.zeros(0, 3, 4, 6)), VICTIM.clip_id, "moments: shape=(0, 3, 4, 6)"),
    dropped("moments odd", tensors(moments=torch.zeros(3, 3, 4, 6)), VICTIM.clip_id, "moments: shape=(3, 3, 4, 6)"),
    dropped("fewer channels", tensors(moments=torch.zeros(2, 3, 4, 6)), VICTIM.clip_id, "expected (4, 3, 4, 6)"),
    dropped("more frames", tensors(moments=torch.zeros(4, 4, 4, 6)), VICTIM.clip_id, "shape=(4, 4, 4, 6)"),
    dropped("other height", tensors(moments=torch.zeros(4, 3, 5, 6)), VICTIM.clip_id, "shape=(4, 3, 5, 6)"),
    dropped("other width", tensors(moments=torch.zeros(4, 3, 4, 7)), VICTIM.clip_id, "shape=(4, 3, 4, 7)"),
    dropped("shorter text", tensors(text=torch.zeros(4, 6)), VICTIM.clip_id, "text: shape=(4, 6)"),
    dropped("narrower text", tensors(text=torch.zeros(5, 5)), VICTIM.clip_id, "text: shape=(5, 5)"),
    dropped("text of three axes", tensors(text=torch.zeros(5, 6, 1)), VICTIM.clip_id, "text: shape=(5, 6, 1)"),
    dropped(
        "NaN in moments", tensors(moments=torch.full((4, 3, 4, 6), math.nan)), VICTIM.clip_id, "moments has infinite"
    ),
    dropped("one infinity in text", tensors(text=torch.eye(5, 6) / 0), VICTIM.clip_id, "text has infinite"),
]


@attacks(HEADERS)
def test_header_of_a_latent_file(attack: Attack, store: LatentStore) -> None:
    path = victim_path(store)
    file = File.read(path)
    attack.content(file)
    file.write(path)
    wrong = path.read_bytes()
    check_ending(attack, lambda: findings(verify_store(store, repair=True, num_workers=1)))
    assert not path.exists()
    assert (store.path / "damaged" / path.relative_to(store.path)).read_bytes() == wrong
    assert len(store.clip_ids(GEOMETRY)) == 5


@attacks(case for case in HEADERS if "infinit" not in str(case.says) and "NaN" not in case.name)
def test_training_goes_on_without_such_a_file(attack: Attack, store: LatentStore) -> None:
    file = File.read(victim_path(store))
    attack.content(file)
    file.write(victim_path(store))
    order = SampleOrder([6], [1], seed=0)
    ids = store.clip_ids(GEOMETRY)
    dataset = LatentDataset(
        LatentStore.open(store.path), [(GEOMETRY, ids)], order, seed=0, num_levels=1000, caption_dropout=0.5
    )
    samples = [dataset[position] for position in range(6)]
    assert {clip_id for sample in samples for clip_id in sample.replaced} == {VICTIM.clip_id}
    assert {sample.latents_TCHW.shape for sample in samples} == {(3, 2, 4, 6)}


def test_cut_files_are_damaged_wherever_they_are_cut(store: LatentStore) -> None:
    content = victim_path(store).read_bytes()
    for length in {*range(0, len(content), max(1, len(content) // 97)), *range(16)}:
        victim_path(store).write_bytes(content[:length])
        with pytest.raises(CorruptLatent, match=VICTIM.clip_id):
            store.read(VICTIM.clip_id, GEOMETRY)


# -- what is no part of a store ---------------------------------------------------------------------------------------


STRAYS = [
    held("a JSON file at the top", "notes.json"),
    held("a name with a newline", "two\nlines.json"),
    held("a name with an escape", "\x1b[31mred"),
    held("a file among the geometries", "clips/notes.json"),
    held("a folder of an unknown geometry", "clips/49x480x720_8fps/abc/abcdef.safetensors"),
    held("a file among the shards", f"clips/{GEOMETRY.name}/{'0' * 32}.safetensors"),
    held("a JSON file in a shard", f"clips/{GEOMETRY.name}/{VICTIM.clip_id[:3]}/notes.json"),
    held("a clip in another's shard", f"clips/{GEOMETRY.name}/zzz/{VICTIM.clip_id}.safetensors"),
    held("a file without an id", f"clips/{GEOMETRY.name}/{VICTIM.clip_id[:3]}/a clip.safetensors"),
]


@attacks(STRAYS)
def test_strays_are_listed_and_left_alone(attack: Attack, store: LatentStore) -> None:
    stray = store.path / attack.content
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"mine")
    found = verify_store(store, repair=True, num_workers=1)
    check_ending(attack, lambda: findings(found))
    assert len(found.survey.strays) == 1
    assert all(line.isprintable() for line in found.describe().split("\n"))
    assert stray.read_bytes() == b"mine"
    assert found.is_clean
