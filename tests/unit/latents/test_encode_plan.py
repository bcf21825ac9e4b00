"""What a run has to do: clips that are new, or no longer as they were encoded."""

import json
from dataclasses import replace

import pytest
import torch
from support.store import settings_for

from exvideo_train.clips.record import ClipRecord, make_clip_id, write_manifest
from exvideo_train.geometry import Geometry
from exvideo_train.latents.encode_plan import make_plan, take_from_index, write_index
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.normalisation import Normalisation

from .conftest import fingerprint_of

GEOMETRY = Geometry(9, 32, 48, 8)


def records(count):
    return [
        ClipRecord(make_clip_id("t", str(n), 0, None), "t", f"/videos/{n}.mp4", 0, None, f"caption {n}")
        for n in range(count)
    ]


def write(store, record):
    return store.write_clip(
        record.clip_id,
        GEOMETRY,
        {"moments": torch.zeros(4, 3, 4, 6), "text": torch.zeros(5, 6)},
        record.caption,
        sampling_fps=record.sampling_fps,
    )


@pytest.fixture
def settings(tmp_path):
    for part, config in (("vae", {"latent_channels": 2}), ("text_encoder", {"d_model": 6})):
        (tmp_path / "model" / part).mkdir(parents=True)
        (tmp_path / "model" / part / "config.json").write_text(json.dumps(config))
    store = LatentStore.create(tmp_path / "store", Normalisation((0.7,)))
    store.add_geometry(fingerprint_of(GEOMETRY))
    return settings_for(store, GEOMETRY, tmp_path / "model")


def plan_of(settings, clips, max_clips=0):
    manifest = settings.model_path.parent / "clips.jsonl"
    write_manifest(manifest, clips)
    store = LatentStore.open(settings.store_path)
    return make_plan(settings, store, manifest, retry_quarantined=False, max_clips=max_clips)


@pytest.fixture
def encoded(settings):
    """Four clips in a store, the last at a rate of its own."""
    clips = records(4)
    clips[3] = replace(clips[3], sampling_fps=12.5)
    store = LatentStore.open(settings.store_path)
    store.write_index(write(store, record) for record in clips)
    return clips


@pytest.mark.parametrize("with_index", [True, False])
def test_clips_are_reused_as_long_as_caption_and_rate_are_the_same(settings, encoded, with_index):
    if not with_index:
        (settings.store_path / "index.jsonl").unlink()
    assert plan_of(settings, encoded).num_reused == 4
    changed = [
        replace(encoded[0], caption="another"),
        replace(encoded[1], sampling_fps=10.0),
        encoded[2],
        replace(encoded[3], sampling_fps=None),
    ]
    plan = plan_of(settings, changed)
    assert (plan.num_reused, plan.num_changed) == (1, 3)
    assert [record.clip_id for record in plan.pending] == [changed[n].clip_id for n in (0, 1, 3)]


def test_the_rate_stands_in_file_and_index(settings, encoded):
    store = LatentStore.open(settings.store_path)
    assert [store.read_entry(record.clip_id, GEOMETRY) for record in encoded] == [
        store.read_index()[GEOMETRY.name, record.clip_id] for record in encoded
    ]
    assert {entry.clip_id: entry.sampling_fps for entry in store.read_index().values()} == {
        record.clip_id: record.sampling_fps for record in encoded
    }
    # Clips at the geometry's rate have the lines that they always had.
    assert sum("sampling_fps" in line for line in store.index_path.read_text().splitlines()) == 1


def test_index_never_names_an_outdated_clip(settings, encoded):
    """Whatever stops a run that encodes changed clips again, and whenever."""
    store = LatentStore.open(settings.store_path)
    changed = [replace(encoded[0], caption="another"), replace(encoded[1], sampling_fps=10.0), *encoded[2:]]
    before = {entry.clip_id: entry for entry in store.read_index().values()}
    plan = plan_of(settings, changed, max_clips=1)
    assert set(plan.outdated) == {record.clip_id for record in changed[:2]}

    take_from_index(store, GEOMETRY, plan.outdated)
    assert store.clip_ids(GEOMETRY) == sorted(record.clip_id for record in changed[2:])
    # Stopped before anything was written: the index stays as it is, and the next run finds the same to do.
    write_index(store, GEOMETRY, plan.outdated)
    assert store.clip_ids(GEOMETRY) == sorted(record.clip_id for record in changed[2:])
    assert plan_of(settings, changed).pending == plan_of(settings, changed, max_clips=2).pending

    # Stopped after one: that one is back, with its new caption.
    write(store, changed[0])
    write_index(store, GEOMETRY, plan.outdated)
    assert store.clip_ids(GEOMETRY) == sorted(changed[n].clip_id for n in (0, 2, 3))
    entry = store.read_index()[GEOMETRY.name, changed[0].clip_id]
    assert entry == store.read_entry(changed[0].clip_id, GEOMETRY)
    assert entry.is_of(changed[0])
    assert entry != before[changed[0].clip_id]

    write(store, changed[1])
    write_index(store, GEOMETRY, plan.outdated)
    plan = plan_of(settings, changed)
    assert (plan.num_reused, plan.outdated) == (4, {})


def test_the_former_manifest_finds_its_clips_again(settings, encoded):
    store = LatentStore.open(settings.store_path)
    index = store.index_path.read_bytes()
    plan = plan_of(settings, [replace(record, caption="") for record in encoded])
    take_from_index(store, GEOMETRY, plan.outdated)
    assert not store.read_index()
    plan = plan_of(settings, encoded)
    assert plan.num_reused == 4
    write_index(store, GEOMETRY, plan.outdated)
    assert store.index_path.read_bytes() == index


def test_notes_that_once_stood_in_the_index_are_read_over(settings, encoded):
    store = LatentStore.open(settings.store_path)
    index = store.index_path.read_text()
    first, others = index.split("\n", 1)
    store.index_path.write_text(json.dumps({**json.loads(first), "decord_refusal": "corrupt"}) + "\n" + others)
    write_index(store, GEOMETRY, {})
    assert store.index_path.read_text() == index
