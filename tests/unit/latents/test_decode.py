"""Decoding processes with a real clip: killed, timed out, recycled."""

import gc
import os
import signal
import threading
import time

import pytest
import torch
from support.broken import write_broken, write_good

from exvideo_train.clips import workers
from exvideo_train.clips.reader import read_frames
from exvideo_train.clips.record import ClipRecord, make_clip_id
from exvideo_train.geometry import Geometry
from exvideo_train.latents.decode import DecodeOptions, DecodeWorker, decode_clips

GEOMETRY = Geometry(9, 32, 48, 8)


def record_of(video, start=0.0):
    return ClipRecord(make_clip_id("test", str(video), start, None), "test", str(video), start, None, "a rabbit")


@pytest.fixture
def worker():
    worker = DecodeWorker(DecodeOptions(GEOMETRY, timeout_seconds=60, recycle_after=2))
    yield worker
    worker.close()


def test_frames_are_the_readers_and_failures_cost_nothing_else(worker, clip_path, tmp_path):
    missing = worker.decode(record_of(tmp_path / "missing.mp4"))
    assert missing.failure is not None
    assert missing.failure.reason == "missing"
    decoded = worker.decode(record_of(clip_path, 0.5))
    assert decoded.failure is None
    assert torch.equal(decoded.frames_FHWC, read_frames(record_of(clip_path, 0.5), GEOMETRY))


def test_worker_is_recycled(worker, clip_path):
    pids = []
    for _ in range(3):
        assert worker.decode(record_of(clip_path)).failure is None
        pids.append(worker._process.pid)
    assert pids[0] == pids[1] != pids[2]
    assert not os.path.exists(f"/proc/{pids[0]}")


def test_replaced_workers_leave_no_descriptors(worker, clip_path):
    assert worker.decode(record_of(clip_path)).failure is None
    before = os.listdir("/proc/self/fd")
    # What only a collection of circles frees grows until one comes.
    gc.disable()
    try:
        for _ in range(4):
            assert worker.decode(record_of(clip_path)).failure is None
    finally:
        gc.enable()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_hanging_decoder_is_killed_and_replaced(worker, clip_path):
    assert worker.decode(record_of(clip_path)).failure is None
    hanging = worker._process.pid
    os.kill(hanging, signal.SIGSTOP)
    workers._set_patience(worker._connection, 0.5)
    decoded = worker.decode(record_of(clip_path))
    assert decoded.failure is not None
    assert decoded.failure.reason == "timeout"
    assert not os.path.exists(f"/proc/{hanging}")
    assert worker.decode(record_of(clip_path)).failure is None


@pytest.mark.parametrize("num_deaths", [1, 2])
def test_dying_decoder_gets_a_second_chance(worker, tmp_path, monkeypatch, num_deaths):
    good = write_good(tmp_path / "good.mp4")
    video = tmp_path / "clip.mp4"
    # It takes minutes to read, so that a worker that has it is killed over it and over nothing else.
    write_broken("hang", good, video)
    attempts = []
    attempt = worker._attempt

    def noted(*arguments):
        attempts.append(worker._process.pid)
        return attempt(*arguments)

    monkeypatch.setattr(worker, "_attempt", noted)

    def kill():
        for number in range(num_deaths):
            while len(attempts) <= number:
                time.sleep(0.001)
            if number == 0 and num_deaths == 1:
                os.replace(good, video)
            os.kill(attempts[number], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    decoded = worker.decode(record_of(video, 0.8))
    assert len(set(attempts)) == len(attempts) == 2
    if num_deaths == 1:
        assert decoded.failure is None
    else:
        assert decoded.failure is not None
        assert decoded.failure.reason == "worker_died"
        assert "exit code -9" in decoded.failure.detail


def test_every_clip_comes_once(clip_path, tmp_path):
    records = [record_of(clip_path, 0.1 * n) for n in range(10)] + [record_of(tmp_path / "missing.mp4")]
    decoded = list(decode_clips(records, DecodeOptions(GEOMETRY, 60, 100), num_workers=2, prefetch=2))
    assert sorted(d.record.clip_id for d in decoded) == sorted(r.clip_id for r in records)
    assert [d.failure.reason for d in decoded if d.failure] == ["missing"]


def test_an_error_of_the_list_of_clips_reaches_the_caller():
    def records():
        raise OSError("the work list is gone")
        yield

    with pytest.raises(OSError, match="work list"):
        list(decode_clips(records(), DecodeOptions(GEOMETRY, 60, 100), num_workers=1, prefetch=1))
