"""Encoding processes that die or hang: whose fault it is, and how the rest of the clips fares."""

import pytest
from support.encoders import BROKEN_DEVICE, UNSTARTABLE_DEVICE, obedient_encoder

from exvideo_train.clips.record import ClipRecord, make_clip_id
from exvideo_train.errors import UserError
from exvideo_train.latents import supervise
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.latents.store import Quarantine
from exvideo_train.latents.supervise import Supervisor
from tests.unit.latents.conftest import GEOMETRY

NEVER = 300.0


@pytest.fixture
def supervise_clips(store, monkeypatch):
    """Run encoders over clips of given captions: (captions settled, quarantined by caption, supervisor, error)."""
    monkeypatch.setattr(supervise, "encoder_main", obedient_encoder)
    monkeypatch.setattr(supervise, "WATCH_SECONDS", 0.05)

    def run(captions, devices=("cpu",), encode_timeout_seconds=NEVER):
        records = [
            ClipRecord(make_clip_id("t", str(number), 0, None), "t", f"/{number}.mp4", 0, None, caption)
            for number, caption in enumerate(captions)
        ]
        settings = EncodeSettings(
            model_path=store.path / "no_model",
            store_path=store.path,
            fingerprint=store.fingerprints[GEOMETRY.name],
            normalisation=store.normalisation,
            dtype="fp32",
            tiling=False,
            decode_workers=1,
            prefetch_clips=1,
            clip_timeout_seconds=10.0,
            recycle_after_clips=1,
            encode_timeout_seconds=encode_timeout_seconds,
        )
        settled = []
        supervisor = Supervisor(settings, devices, settled.append)
        supervisor.work.create(records, len(devices))
        by_id = {record.clip_id: record.caption for record in records}

        def outcome():
            details = {by_id[entry.clip_id]: entry for entry in Quarantine(store.path, GEOMETRY)}
            return [by_id[clip_id] for clip_id in settled], details, supervisor

        try:
            supervisor.run()
        except UserError as error:
            return (*outcome(), str(error))
        return (*outcome(), None)

    return run


def test_clip_that_kills_twice_is_quarantined_and_one_that_kills_once_is_not(supervise_clips, capsys):
    settled, quarantined, supervisor, error = supervise_clips(["first", "dies once", "dies", "last"])
    assert error is None
    assert settled == ["first", "dies once", "last"]
    assert [(caption, entry.reason) for caption, entry in quarantined.items()] == [("dies", "encoder_died")]
    assert "died 2 times (exit code 3)" in quarantined["dies"].detail
    assert capsys.readouterr().out.count("and is replaced") == 3
    assert sum(totals.num_encoded for totals in supervisor.totals) == 3
    assert supervisor.work.counts() == (0, 0)


def test_neighbours_that_kill_do_not_end_the_run(supervise_clips):
    settled, quarantined, _, error = supervise_clips(["first", "dies", "dies", "dies", "last"])
    assert error is None
    assert settled == ["first", "last"]
    assert len(quarantined) == 1  # all three are called "dies"


def test_hanging_encoder_is_killed_and_its_clip_quarantined(supervise_clips, capsys):
    settled, quarantined, supervisor, error = supervise_clips(["first", "hangs", "last"], encode_timeout_seconds=1.5)
    assert error is None
    assert settled == ["first", "last"]
    assert quarantined["hangs"].reason == "encoder_died"
    assert "1.5 s without a sign of life" in quarantined["hangs"].detail
    assert capsys.readouterr().out.count("and is replaced") == 2
    assert supervisor.work.counts() == (0, 0)


def test_encoder_that_dies_whatever_the_clip_ends_the_run_and_blames_no_clip(supervise_clips):
    settled, quarantined, _, error = supervise_clips(["a", "b", "c", "d", "e"], devices=[BROKEN_DEVICE])
    assert error is not None
    assert f"{BROKEN_DEVICE} died {supervise.DEATHS_IN_A_ROW} times" in error
    assert (settled, quarantined) == ([], {})


def test_encoder_that_does_not_start_ends_the_run_soon(supervise_clips):
    _, quarantined, supervisor, error = supervise_clips(["a"], devices=[UNSTARTABLE_DEVICE])
    assert error is not None
    assert f"died {supervise.DEATHS_WITHOUT_CLIP} times" in error
    assert "exit code 4" in error
    assert quarantined == {}
    assert supervisor.work.counts() == (1, 0)


def test_the_other_devices_go_on_without_a_broken_one(supervise_clips, capsys):
    settled, quarantined, supervisor, error = supervise_clips(
        ["slow", "slow", "a", "b"], devices=["cpu", UNSTARTABLE_DEVICE]
    )
    assert error is None
    assert sorted(settled) == ["a", "b", "slow", "slow"]
    assert quarantined == {}
    assert f"{UNSTARTABLE_DEVICE} is given up" in capsys.readouterr().out
    assert supervisor.work.counts() == (0, 0)
