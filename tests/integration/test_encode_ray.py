"""A local Ray cluster whose encoders die, hang and share captions."""

from collections import Counter

import pytest
from support import encoders
from support.store import settings_for
from support.videos import clip_of, make_video

from exvideo_train.geometry import Geometry
from exvideo_train.latents import ray_engine
from exvideo_train.latents.fingerprint import Fingerprint
from exvideo_train.latents.quarantine import Quarantine
from exvideo_train.latents.ray_engine import RayEngine
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.normalisation import Normalisation

GEOMETRY = Geometry(9, 64, 96, 25)
CAPTIONS = ["shared", "dies", "shared", "alone", "hangs", "shared", "dies once", "shared"]


@pytest.fixture
def settings(tmp_path):
    fingerprint = Fingerprint(
        sha256={"vae": "v" * 64, "text_encoder": "t" * 64, "tokenizer": "k" * 64},
        vae_dtype="fp32",
        text_dtype="fp32",
        tiling=False,
        text_length=5,
        num_frames=9,
        height=64,
        width=96,
        fps=25.0,
        decoder="decord",
    )
    store = LatentStore.create(tmp_path / "store", Normalisation((0.7,)))
    store.add_geometry(fingerprint)
    (store.path / "reports").mkdir()
    return settings_for(store, GEOMETRY, encode_timeout_seconds=5.0)


def test_encoders_that_die_or_hang_cost_their_clip_alone(settings, clip_path, monkeypatch, tmp_path):
    from ray import cloudpickle

    # The cluster's processes do not find the tests' modules by name.
    cloudpickle.register_pickle_by_value(encoders)
    monkeypatch.setattr(ray_engine, "EncodeActor", encoders.ObedientActor)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    records = [clip_of(clip_path, 0.4 * number, None, caption) for number, caption in enumerate(CAPTIONS)]
    records.append(clip_of(make_video(tmp_path / "old.wmv", codec="wmv2", frames=30), caption="for PyAV"))
    settled = []
    engine = RayEngine(settings, records, settled.append)
    engine.run()

    captions = {record.clip_id: record.caption for record in records}
    assert Counter(captions[clip_id] for clip_id in settled) == Counter([*CAPTIONS, "for PyAV"])
    store = LatentStore.open(settings.store_path)
    stored = Counter(captions[clip_id] for clip_id in store.clip_ids_on_disk(GEOMETRY))
    assert stored == Counter({"shared": 4, "alone": 1, "dies once": 1, "for PyAV": 1})
    headers = [store.read_header(record.clip_id, GEOMETRY) for record in records[:1] + records[-1:]]
    assert [header.content.get("decord_refusal") for header in headers] == [None, "unsupported_codec"]
    left_out = {captions[entry.clip_id]: entry for entry in Quarantine(store.path, GEOMETRY)}
    assert {caption: entry.reason for caption, entry in left_out.items()} == dict.fromkeys(
        ("dies", "hangs"), "encoder_died"
    )
    assert "killed after 5 s" in left_out["hangs"].detail
    encoded = Counter((store.path / "reports" / "encoded_captions").read_text().splitlines())
    assert encoded["shared"] == encoded["alone"] == 1
    assert encoded["dies once"] == encoded["dies"] == encoded["hangs"] == 2
    assert sum(totals.num_encoded for totals in engine.totals) == 7
    assert not (store.path / "reports" / "captions").exists()
