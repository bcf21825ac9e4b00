"""Checking a store: what is damaged is found, said and taken away, and nothing else is touched."""

import pytest

from exvideo_train.latents.clip_file import CorruptLatent
from exvideo_train.latents.inspection import verify_store
from exvideo_train.latents.plan import drop_damaged_empty_prompt
from tests.unit.latents.conftest import GEOMETRY


def damage_empty_prompt(store, kind):
    path = store.empty_prompt_path
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    elif kind == "truncated":
        path.write_bytes(content[:-3])
    elif kind == "a clip":
        path.write_bytes(store.clip_path(store.clip_ids(GEOMETRY)[0], GEOMETRY).read_bytes())
    elif kind == "text":
        path.write_text("<html>429 Too Many Requests</html>")
    else:
        path.unlink()


def test_whole_store_is_clean_and_left_alone(store):
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    found = verify_store(store, repair=True, num_workers=1)
    assert found.is_clean
    assert "12 whole" in found.describe()
    assert "empty prompt" not in found.describe()
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*")} == before


@pytest.mark.parametrize("kind", ["flipped", "truncated", "a clip", "text", "missing"])
def test_damaged_empty_prompt_is_found_and_deleted(store, kind):
    damage_empty_prompt(store, kind)
    with pytest.raises(CorruptLatent, match="empty_prompt"):
        store.empty_prompt()
    found = verify_store(store, repair=False, num_workers=1)
    assert not found.is_clean
    assert all(result.is_clean for result in found.geometries)
    assert "empty prompt: missing or damaged" in found.describe()
    assert store.empty_prompt_path.exists() == (kind != "missing")
    index = store.index_path.read_bytes()
    verify_store(store, repair=True, num_workers=1)
    assert not store.empty_prompt_path.exists()
    assert store.index_path.read_bytes() == index
    assert len(list(store.clip_ids_on_disk(GEOMETRY))) == 12


def test_encoding_writes_a_damaged_empty_prompt_anew(store, capsys):
    drop_damaged_empty_prompt(store)
    assert store.empty_prompt_path.exists()
    damage_empty_prompt(store, "flipped")
    drop_damaged_empty_prompt(store)
    assert "encoded again" in capsys.readouterr().out
    assert not store.empty_prompt_path.exists()
