"""Encoding on one machine: clips dealt out, encoders that die or hang and whose fault it is, one encoder's loop."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from support.encoders import BROKEN_DEVICE, UNSTARTABLE_DEVICE, obedient_encoder
from support.store import settings_for

from exvideo_train.clips.record import ClipRecord, make_clip_id
from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.latents import local_engine
from exvideo_train.latents.encoder import ClipEncoder, EncodeLoop, not_finite
from exvideo_train.latents.fingerprint import model_fingerprint
from exvideo_train.latents.local_engine import ClipQueue, LocalEngine
from exvideo_train.latents.quarantine import Quarantine
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.cogvideox.encoding import read_normalisation
from tests.unit.latents.conftest import GEOMETRY

NEVER = 300.0


@pytest.fixture
def encode_clips(store, monkeypatch):
    """Run encoders over clips of given captions: (captions settled, quarantined by caption, engine, error)."""
    monkeypatch.setattr(local_engine, "encoder_main", obedient_encoder)
    monkeypatch.setattr(local_engine, "WATCH_SECONDS", 0.05)

    def run(captions, devices=("cpu",), encode_timeout_seconds=NEVER):
        records = [
            ClipRecord(make_clip_id("t", str(number), 0, None), "t", f"/{number}.mp4", 0, None, caption)
            for number, caption in enumerate(captions)
        ]
        settings = settings_for(
            store, GEOMETRY, clip_timeout_seconds=10.0, encode_timeout_seconds=encode_timeout_seconds
        )
        settled = []
        engine = LocalEngine(settings, devices, records, settled.append)
        by_id = {record.clip_id: record.caption for record in records}

        def outcome():
            details = {by_id[entry.clip_id]: entry for entry in Quarantine(store.path, GEOMETRY)}
            return [by_id[clip_id] for clip_id in settled], details, engine

        try:
            engine.run()
        except UserError as error:
            return (*outcome(), str(error))
        return (*outcome(), None)

    return run


def records_of(captions):
    return [ClipRecord(f"{number:03d}", "t", f"/{number}.mp4", 0, None, c) for number, c in enumerate(captions)]


@pytest.mark.parametrize(
    ("captions", "first", "second"),
    [
        ("abcdef", "ace", "bdf"),
        # Neighbours of one caption stay with one encoder, and the other goes on.
        ("aaabcc", "aaa", "bcc"),
        ("aabbbcd", "aacd", "bbb"),
        # All of one caption: both are to end at the same time.
        ("aaaaaa", "aaa", "aaa"),
        ("abbbbbb", "abbb", "bbb"),
        ("", "", ""),
    ],
)
def test_clips_are_dealt_out_as_they_are_asked_for(captions, first, second):
    clips, taken = ClipQueue(records_of(captions)), {1: [], 2: []}
    while record := clips.take(1):
        taken[1].append(record)
        if record := clips.take(2):
            taken[2].append(record)
    ids = sorted(record.clip_id for records in taken.values() for record in records)
    assert ids == sorted(record.clip_id for record in records_of(captions))
    assert ["".join(record.caption for record in taken[number]) for number in (1, 2)] == [first, second]
    assert (len(clips), clips.take(2)) == (0, None)


def test_what_the_dead_had_comes_first():
    clips = ClipQueue(records_of("aaab"))
    in_work = [clips.take(1), clips.take(1)]
    clips.give_back(1, in_work)
    assert len(clips) == 4
    assert "".join(clips.take(2).clip_id for _ in range(4)) == "000001002003"


def test_clip_that_kills_twice_is_quarantined_and_one_that_kills_once_is_not(encode_clips, capsys):
    settled, quarantined, engine, error = encode_clips(["first", "dies once", "dies", "last"])
    assert error is None
    assert settled == ["first", "dies once", "last"]
    assert [(caption, entry.reason) for caption, entry in quarantined.items()] == [("dies", "encoder_died")]
    assert "died 2 times (exit code 3)" in quarantined["dies"].detail
    assert capsys.readouterr().out.count("and is replaced") == 3
    assert sum(totals.num_encoded for totals in engine.totals) == 3
    assert len(engine.clips) == 0


def test_neighbours_that_kill_do_not_end_the_run(encode_clips):
    settled, quarantined, _, error = encode_clips(["first", "dies", "dies", "dies", "last"])
    assert error is None
    assert settled == ["first", "last"]
    assert len(quarantined) == 1  # all three are called "dies"


def test_hanging_encoder_is_killed_and_its_clip_quarantined(encode_clips, capsys):
    settled, quarantined, engine, error = encode_clips(["first", "hangs", "last"], encode_timeout_seconds=1.5)
    assert error is None
    assert settled == ["first", "last"]
    assert quarantined["hangs"].reason == "encoder_died"
    assert "1.5 s without a sign of life" in quarantined["hangs"].detail
    assert capsys.readouterr().out.count("and is replaced") == 2
    assert len(engine.clips) == 0


def test_encoder_that_dies_whatever_the_clip_ends_the_run_and_blames_no_clip(encode_clips):
    settled, quarantined, _, error = encode_clips(["a", "b", "c", "d", "e"], devices=[BROKEN_DEVICE])
    assert error is not None
    assert f"{BROKEN_DEVICE} died {local_engine.DEATHS_IN_A_ROW} times" in error
    assert (settled, quarantined) == ([], {})


def test_encoder_that_does_not_start_ends_the_run_soon(encode_clips):
    _, quarantined, engine, error = encode_clips(["a"], devices=[UNSTARTABLE_DEVICE])
    assert error is not None
    assert f"died {local_engine.DEATHS_WITHOUT_CLIP} times" in error
    assert "exit code 4" in error
    assert quarantined == {}
    assert len(engine.clips) == 1


def test_the_other_devices_go_on_without_a_broken_one(encode_clips, capsys):
    settled, quarantined, engine, error = encode_clips(["slow", "slow", "a", "b"], devices=["cpu", UNSTARTABLE_DEVICE])
    assert error is None
    assert sorted(settled) == ["a", "b", "slow", "slow"]
    assert quarantined == {}
    assert f"{UNSTARTABLE_DEVICE} is given up" in capsys.readouterr().out
    assert len(engine.clips) == 0


def test_captions_shared_by_clips_are_encoded_once(tiny_model_5b, clip_path, tmp_path):
    geometry = Geometry(9, 32, 48, 25)
    fingerprint = model_fingerprint(
        tiny_model_5b, geometry, decoder="pyav", vae_dtype="fp32", text_dtype="fp32", tiling=False
    )
    store = LatentStore.create(tmp_path / "store", read_normalisation(tiny_model_5b))
    store.add_geometry(fingerprint)
    settings = settings_for(store, geometry, tiny_model_5b, decode_workers=2)
    captions = ["a rabbit"] * 5 + ["a tree", "a rabbit in a tree"] + ["a meadow"] * 2
    records = [
        ClipRecord(make_clip_id("t", str(clip_path), 0.4 * n, None), "t", str(clip_path), 0.4 * n, None, caption)
        for n, caption in enumerate(captions)
    ]
    encoder = ClipEncoder(settings, "cpu")
    calls: Counter[str] = Counter()
    encode = encoder._text.encode

    def counted(captions):
        calls.update(captions)
        return encode(captions)

    encoder._text.encode = counted
    messages = []
    loop = EncodeLoop(settings, messages.append)
    loop.run(encoder, records)
    assert calls == Counter({"": 1, **dict.fromkeys(captions, 1)})
    assert sorted(store.clip_ids_on_disk(geometry)) == sorted(record.clip_id for record in records)
    assert {store.read(record.clip_id, geometry).caption for record in records} == set(captions)
    assert loop.totals.num_encoded == len(records)
    assert Counter(kind for kind, *_ in messages) == {"began": len(records), "settled": len(records)}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_too_little_memory_is_named_however_it_shows(error):
    with pytest.raises(UserError, match="set tiling=true"):
        clip_encoder_that_raises(error).frame_tensors(torch.zeros(9, 32, 48, 3, dtype=torch.uint8), 8.0)


def test_other_errors_are_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        clip_encoder_that_raises(RuntimeError("CUDA error: an illegal memory access")).frame_tensors(
            torch.zeros(9, 32, 48, 3, dtype=torch.uint8), 8.0
        )


def clip_encoder_that_raises(error):
    def encode(frames_FHWC, fps):
        raise error

    encoder = ClipEncoder.__new__(ClipEncoder)
    encoder._video = SimpleNamespace(tensors=encode)
    return encoder


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_a_failure_of_their_encoder(value):
    whole, broken = torch.zeros(2, 3), torch.tensor([0.0, value])
    assert not_finite({"x": whole}, {"x": whole}) is None
    for moments, text, encoder in ((broken, whole, "the VAE"), (whole, broken, "the text encoder")):
        failure = not_finite({"moments": moments}, {"text": text})
        assert failure is not None
        assert failure.reason == "not_finite"
        assert failure.detail.startswith(encoder)
