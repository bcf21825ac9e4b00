import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import CorruptLatent, MissingLatent
from exvideo_train.latents.fingerprint import Fingerprint, component_digest, model_fingerprint
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.cogvideox.encoding import read_normalisation
from exvideo_train.models.normalisation import Normalisation
from tests.unit.latents.conftest import GEOMETRY, fill, fingerprint_of


def test_round_trip(store):
    opened = LatentStore.open(store.path)
    ids = opened.clip_ids(GEOMETRY)
    assert len(ids) == 12
    assert ids == sorted(opened.clip_ids_on_disk(GEOMETRY))
    clip = opened.read(ids[0], GEOMETRY)
    assert clip.tensors["moments"].shape == (4, 3, 4, 6)
    assert clip.tensors["text"].shape == (5, 6)
    assert clip.caption.startswith("caption")
    assert opened.normalisation == Normalisation((0.7,))
    assert torch.equal(opened.empty_prompt()["text"], torch.full((5, 6), 0.5))
    entries = opened.read_index()
    for clip_id in ids:
        assert opened.read_entry(clip_id, GEOMETRY) == entries[GEOMETRY.name, clip_id]


def test_files_are_spread_and_named_by_id(store):
    clip_id = store.clip_ids(GEOMETRY)[3]
    path = store.path / "clips" / "9x32x48_8fps" / clip_id[:3] / f"{clip_id}.safetensors"
    assert path.is_file()


def test_same_content_is_same_bytes_in_every_process(tmp_path):
    script = """
import sys, torch
from pathlib import Path
from tests.unit.latents.conftest import fingerprint_of, fill, GEOMETRY
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.normalisation import Normalisation
store = LatentStore.create(Path(sys.argv[1]), Normalisation((0.7,)))
store.add_geometry(fingerprint_of())
fill(store, GEOMETRY, 3)
"""
    digests = []
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", script, tmp_path / name], check=True, cwd=os.getcwd())
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        digests.append({p.relative_to(tmp_path / name): hashlib.sha256(p.read_bytes()).digest() for p in files})
    assert digests[0] == digests[1]
    assert len(digests[0]) == 6


@pytest.mark.parametrize("damage", ["truncate", "flip", "zero", "delete", "swap", "text"])
def test_damaged_file_is_refused(store, damage):
    first, second = store.clip_ids(GEOMETRY)[:2]
    path = store.clip_path(first, GEOMETRY)
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[:-10])
    elif damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "zero":
        path.write_bytes(b"")
    elif damage == "delete":
        path.unlink()
    elif damage == "swap":
        path.write_bytes(store.clip_path(second, GEOMETRY).read_bytes())
    else:
        path.write_text("not a latent file, but long enough to look like one")
    with pytest.raises(MissingLatent if damage == "delete" else CorruptLatent, match=first):
        store.read(first, GEOMETRY)


def test_several_geometries_in_one_store(store):
    portrait = Geometry(17, 48, 32, 8)
    store.add_geometry(fingerprint_of(portrait))
    fill(store, portrait, 4)
    opened = LatentStore.open(store.path)
    assert opened.geometries() == [portrait, GEOMETRY]
    assert len(opened.clip_ids(portrait)) == 4
    assert len(opened.clip_ids(GEOMETRY)) == 12


def test_second_geometry_of_another_model_is_refused(store):
    other = fingerprint_of(Geometry(17, 48, 32, 8), vae_sha256="x" * 64)
    with pytest.raises(UserError, match=r"vae_sha256: the store has v+, this run has x+"):
        store.add_geometry(other)


def test_stale_store_is_refused_by_field(store):
    stale = fingerprint_of(text_encoder_sha256="x" * 64, tiling=True)
    with pytest.raises(UserError) as caught:
        store.require(stale)
    message = str(caught.value)
    assert "text_encoder_sha256" in message
    assert "tiling: the store has False, this run has True" in message
    assert "vae_sha256" not in message
    assert "model.path" in message


def test_other_geometry_is_refused_by_field(store):
    with pytest.raises(UserError) as caught:
        store.require(fingerprint_of(Geometry(49, 32, 48, 16)))
    assert "num_frames: the store has 9, this run has 49" in str(caught.value)
    assert "fps: the store has 8.0, this run has 16.0" in str(caught.value)


def test_stores_of_before_decoders_could_be_chosen_are_pyavs(store):
    before = json.loads((store.path / "store.json").read_text())["geometries"][GEOMETRY.name]
    del before["decoder"]
    pyav, decord = (fingerprint_of(decoder=name) for name in ("pyav", "decord"))
    assert Fingerprint.from_json(before, store.path) == pyav
    assert pyav.to_json() == before
    assert pyav.differences(decord) == [("decoder", "pyav", "decord")]
    assert pyav.differences(fingerprint_of()) == []
    assert pyav.digest() != decord.digest()


def test_unknown_fields_are_not_compared(store):
    store.require(fingerprint_of(text_encoder_sha256=None, tiling=None, vae_dtype=None))


def test_missing_store_and_wrong_version(tmp_path):
    with pytest.raises(UserError, match="no latent store"):
        LatentStore.open(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(UserError, match="format_version=99"):
        LatentStore.open(tmp_path)


def test_damaged_index_names_its_line(store):
    with open(store.index_path, "a") as index:
        index.write('{"clip_id": ')
    with pytest.raises(UserError, match=r"index.jsonl line 13 .*verify"):
        store.clip_ids(GEOMETRY)


def test_component_digest_follows_content(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model" / "vae"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"scaling_factor": 0.7}')
    big = folder / "diffusion_pytorch_model.safetensors"
    big.write_bytes(b"\0" * (1 << 24))
    first = component_digest(folder)
    assert (tmp_path / "cache" / "exvideo_train" / "sha256.json").exists()
    assert component_digest(folder) == first
    (folder / "README.md").write_text("not part of it")
    assert component_digest(folder) == first
    big.write_bytes(b"\0" * (1 << 24) + b"1")
    assert component_digest(folder) != first
    assert component_digest(tmp_path / "absent") is None


def test_fingerprint_of_a_real_model(tiny_model_5b):
    fingerprint = model_fingerprint(tiny_model_5b, GEOMETRY, tiling=False)
    assert fingerprint.text_length == 16
    assert list(fingerprint.sha256) == ["vae", "text_encoder", "tokenizer"]
    assert all(fingerprint.sha256.values())
    assert read_normalisation(tiny_model_5b) == Normalisation((0.7,))
