"""Latent stores from strangers: the files that describe one, and those beside its latents. Wrong ones are named."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attacked_store import (
    DEEP,
    FINGERPRINT,
    GEOMETRY,
    RECORDS,
    VICTIM,
    nothing_dropped,
)
from support.attacks import Attack, Ending, attacks, check_ending, dropped, held, refused

from exvideo_train.errors import UserError
from exvideo_train.latents.encode_report import totals_from_json
from exvideo_train.latents.quarantine import Quarantine
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.cogvideox.encoding import read_normalisation
from exvideo_train.models.normalisation import Normalisation
from exvideo_train.training.job import _check_channels

# -- store.json -------------------------------------------------------------------------------------------------------


def described(**changes: Any) -> bytes:
    return json.dumps(DESCRIPTION | changes).encode()


def fingerprinted(**changes: Any) -> bytes:
    """A fingerprint with other fields; ... takes one away."""
    fields = {k: v for k, v in (FINGERPRINT.to_json() | changes).items() if v is not ...}
    return described(geometries={GEOMETRY.name: fields})


DESCRIPTION = {"format_version": 1, "scaling_factor": 0.7, "geometries": {GEOMETRY.name: FINGERPRINT.to_json()}}
DESCRIPTIONS = [
    held("as it is", described()),
    held("with a field of its own", described(comment="mine")),
    refused("empty", b"", "store.json"),
    refused("a list", b"[]", "store.json", "[] is no JSON object"),
    refused("null", b"null", "store.json", "None is no JSON object"),
    refused("a number", b"7", "store.json"),
    refused("a text", b'"x"', "store.json"),
    refused("nested deep", DEEP, "store.json"),
    refused("UTF-16", described().decode().encode("utf-16"), "store.json"),
    refused("Latin-1", b'{"format_version": "\xe9"}', "store.json"),
    refused("half of it", described()[:60], "store.json"),
    refused("no version", b"{}", "store.json", "format_version is missing"),
    refused("version a text", described(format_version="1"), "format_version='1'"),
    refused("version true", described(format_version=True), "format_version=True"),
    refused("version of 400 digits", b'{"format_version": %s}' % (b"9" * 400), "store.json", "digits"),
    refused("another version", described(format_version=2), "format_version=2", "this version reads 1"),
    refused("no geometries", b'{"format_version": 1, "scaling_factor": 1}', "geometries is missing"),
    refused("geometries a list", described(geometries=[]), "geometries=[]"),
    refused("a geometry null", described(geometries={GEOMETRY.name: None}), "None is no fingerprint"),
    refused("a geometry a list", described(geometries={GEOMETRY.name: []}), "[] is no fingerprint"),
    refused("a name that climbs", described(geometries={"../../x": FINGERPRINT.to_json()}), "'../../x'"),
    refused("another name", described(geometries={"49x480x720_8fps": FINGERPRINT.to_json()}), "49x480x720_8fps"),
    refused("an unknown field", fingerprinted(extra=1), "'extra'"),
    refused("a field is missing", fingerprinted(tiling=...), "'tiling'"),
    refused("frames a text", fingerprinted(num_frames="9"), "num_frames='9'"),
    refused("frames null", fingerprinted(num_frames=None), "num_frames=None"),
    refused("frames not of the VAE", fingerprinted(num_frames=10), "num_frames=10"),
    refused("height true", fingerprinted(height=True), "height=True"),
    refused("height negative", fingerprinted(height=-16), "height=-16"),
    refused("width 1e999", fingerprinted().replace(b'"width": 48', b'"width": 1e999'), "store.json"),
    refused("rate NaN", fingerprinted(fps=math.nan), "NaN"),
    refused("rate 0", fingerprinted(fps=0), "fps=0"),
    refused("digest a list", fingerprinted(vae_sha256=[]), "vae_sha256=[]"),
    refused("dtype unknown", fingerprinted(vae_dtype="int8"), "vae_dtype='int8'"),
    refused("tiling a text", fingerprinted(tiling="no"), "tiling='no'"),
    refused("text length 0", fingerprinted(text_length=0), "text_length=0"),
    refused("rule a text", fingerprinted(frame_rule_version="1"), "frame_rule_version='1'"),
    refused("decoder a list", fingerprinted(decoder=["pyav"]), "decoder=['pyav']"),
]


@attacks(DESCRIPTIONS)
def test_description_of_a_store(attack: Attack, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_bytes(attack.content)

    def run() -> Mapping[str, str]:
        LatentStore.open(tmp_path)
        LatentStore.create(tmp_path, 0.7)
        return {}

    check_ending(attack, run)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_description_that_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "store.json")
    with pytest.raises(UserError, match="not a regular file"):
        LatentStore.open(tmp_path)


# -- the scaling factor: in store.json, in vae/config.json, and when a store is begun ---------------------------------


FACTORS = [
    held("published", "0.7"),
    held("one", "1"),
    refused("zero", "0", "scaling_factor=0"),
    refused("negative zero", "-0.0", "scaling_factor=-0.0"),
    refused("negative", "-0.7", "scaling_factor=-0.7"),
    refused("NaN", "NaN", "scaling_factor"),
    refused("infinite", "Infinity", "scaling_factor"),
    refused("1e999", "1e999", "scaling_factor"),
    refused("1e-300", "1e-300", "scaling_factor=1e-300"),
    refused("400 digits", "1" * 400, "scaling_factor"),
    refused("text", '"0.7"', "scaling_factor='0.7'"),
    refused("true", "true", "scaling_factor=True"),
    refused("null", "null", "scaling_factor=None"),
    refused("list", "[0.7]", "scaling_factor=[0.7]"),
]


@attacks(FACTORS)
def test_scaling_factor(attack: Attack, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(f'{{"scaling_factor": {attack.content}}}')
    check_ending(attack, lambda: nothing_dropped(read_normalisation(tmp_path)))
    value = json.loads(attack.content)
    if attack.ending is Ending.REFUSED:
        with pytest.raises(ValueError, match="scaling_factor"):
            Normalisation((value,))
    description = json.dumps({**DESCRIPTION, "scaling_factor": "FACTOR"}).replace('"FACTOR"', attack.content)
    (tmp_path / "store.json").write_text(description)
    in_store = replace(attack, says=["store.json"] if attack.says else [])
    check_ending(in_store, lambda: nothing_dropped(LatentStore.open(tmp_path)))


@attacks(
    [
        refused("a list", b"[]", "config.json", "holds a list, not an object"),
        refused("null", b"null", "config.json"),
        refused("nested deep", DEEP, "config.json"),
        refused("Latin-1", b'{"x": "\xe9"}', "config.json"),
        refused("no factor", b"{}", "config.json", "scaling_factor"),
    ]
)
def test_config_of_another_shape(attack: Attack, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_bytes(attack.content)
    check_ending(attack, lambda: nothing_dropped(read_normalisation(tmp_path)))


# -- records of quarantine and figures of ranks -----------------------------------------------------------------------


def record_of(**changes: Any) -> bytes:
    fields = {"clip_id": VICTIM.clip_id, "reason": "timeout", "detail": "x", "video": "/v.mp4"} | changes
    return json.dumps({k: v for k, v in fields.items() if v is not ...}).encode()


RECORDS_OF_QUARANTINE = [
    dropped("as it is", record_of(), "timeout"),
    dropped("a video whose name is not UTF-8", record_of(video="/\udcff.mp4"), "timeout"),
    dropped("empty", b"", "damaged_record", VICTIM.clip_id),
    dropped("a list", b"[]", "damaged_record", "no JSON object"),
    dropped("null", b"null", "damaged_record"),
    dropped("nested deep", DEEP, "damaged_record"),
    dropped("not UTF-8", b"\xff\xfe", "damaged_record"),
    dropped("of 2 MB", b" " * 2_000_000, "damaged_record", "2000000 bytes"),
    dropped("of another clip", record_of(clip_id=RECORDS[1].clip_id), "damaged_record", "another clip"),
    dropped("reason a list", record_of(reason=["timeout"]), "damaged_record", "reason=['timeout']"),
    dropped("reason missing", record_of(reason=...), "damaged_record", "reason is missing"),
    dropped("unknown field", record_of(extra=1), "damaged_record", "'extra'"),
    held("a file for no clip", None),
]


@attacks(RECORDS_OF_QUARANTINE)
def test_record_of_quarantine(attack: Attack, store: LatentStore) -> None:
    quarantine = Quarantine(store.path, GEOMETRY)
    shard = quarantine.folder / VICTIM.clip_id[:3]
    shard.mkdir(parents=True)
    (quarantine.folder / "notes.json").write_text("[]")
    (shard / "notes.json").write_text("[]")
    (shard / "notes.txt").write_text("mine")
    if attack.content is not None:
        (shard / f"{VICTIM.clip_id}.json").write_bytes(attack.content)
    check_ending(attack, lambda: {e.clip_id: f"{e.reason} {e.detail}" for e in quarantine})
    assert (VICTIM.clip_id in quarantine) == (attack.content is not None)
    quarantine.remove(VICTIM.clip_id)
    assert VICTIM.clip_id not in quarantine


def test_record_of_quarantine_that_is_a_folder(store: LatentStore) -> None:
    quarantine = Quarantine(store.path, GEOMETRY)
    path = quarantine.folder / VICTIM.clip_id[:3] / f"{VICTIM.clip_id}.json"
    path.mkdir(parents=True)
    assert [entry.reason for entry in quarantine] == ["damaged_record"]
    with pytest.raises(UserError, match="cannot be deleted"):
        quarantine.remove(VICTIM.clip_id)


@pytest.mark.parametrize(
    "content",
    [None, 7, {}, [[]], [{}], [{"num_encoded": "1"}], [{"extra": 1}], [{"quarantined": []}]],
    ids=repr,
)
def test_figures_of_a_rank(content: Any) -> None:
    with pytest.raises(ValueError, match=r"is no|is missing|must be|unknown"):
        totals_from_json(content)


# -- tensors that no training can use -----------------------------------------------------------------------------


def test_empty_prompt_that_is_not_finite_is_never_written(store: LatentStore) -> None:
    before = store.empty_prompt_path.read_bytes()
    with pytest.raises(UserError, match="empty prompt"):
        store.write_empty_prompt({"text": torch.full((5, 6), math.nan)})
    assert store.empty_prompt_path.read_bytes() == before


def test_store_whose_tensors_do_not_fit_the_model(store: LatentStore, tiny_model_5b: Path) -> None:
    with pytest.raises(UserError, match="moments 4, text 6, this model needs moments 32, text 32"):
        _check_channels(store, GEOMETRY, tiny_model_5b)
