"""Checking a store: what is damaged is found, said and moved aside, and nothing else is touched."""

import pytest

from exvideo_train.latents.clip_file import UnusableLatent
from exvideo_train.latents.encode_plan import set_damaged_aside
from exvideo_train.latents.verification import verify_store
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
def test_damaged_empty_prompt_is_found_and_moved_aside(store, kind):
    damage_empty_prompt(store, kind)
    with pytest.raises(UnusableLatent, match="empty_prompt"):
        store.empty_prompt()
    found = verify_store(store, repair=False, num_workers=1)
    assert not found.is_clean
    assert not any(result.has_damage for result in found.geometries)
    assert "empty prompt: missing or damaged" in found.describe()
    assert store.empty_prompt_path.exists() == (kind != "missing")
    index = store.index_path.read_bytes()
    content = store.empty_prompt_path.read_bytes() if kind != "missing" else b""
    moved = verify_store(store, repair=True, num_workers=1).moved
    assert not store.empty_prompt_path.exists()
    assert [path.read_bytes() for path in moved] == ([content] if kind != "missing" else [])
    assert store.index_path.read_bytes() == index
    assert len(list(store.clip_ids_on_disk(GEOMETRY))) == 12


def test_encoding_moves_a_damaged_empty_prompt_aside(store, capsys):
    set_damaged_aside(store, GEOMETRY, [])
    assert store.empty_prompt_path.exists()
    damage_empty_prompt(store, "flipped")
    content = store.empty_prompt_path.read_bytes()
    set_damaged_aside(store, GEOMETRY, [])
    assert "no longer used; kept as" in capsys.readouterr().out
    assert not store.empty_prompt_path.exists()
    assert (store.path / "damaged" / "empty_prompt.safetensors").read_bytes() == content
