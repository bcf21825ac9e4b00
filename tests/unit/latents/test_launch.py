"""Which devices a process of encode_latents takes, each once and unasked, and what machines know of each other."""

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import accelerate.utils
import pytest
import torch

from exvideo_train import locks
from exvideo_train.clips.record import ClipRecord
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_json
from exvideo_train.latents import encode
from exvideo_train.latents.encode import Launch, find_launch, share_out
from exvideo_train.latents.encode_report import Totals, totals_to_json
from exvideo_train.latents.local_engine import EncodersDied


@pytest.fixture
def machine(monkeypatch):
    """Sets the number of GPUs, and what a launcher would: rank, ranks, local rank."""

    def describe(num_gpus, rank=0, world_size=1, local_rank=0):
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if world_size > 1:
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            state = SimpleNamespace(process_index=rank, num_processes=world_size, local_process_index=local_rank)
            monkeypatch.setattr(accelerate, "PartialState", lambda **options: state)
            monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: mine * world_size)

    return describe


def test_one_process_takes_every_gpu(machine):
    machine(num_gpus=4)
    assert find_launch("auto") == Launch(0, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"], [4])
    assert find_launch("cuda:2") == Launch(0, ["cuda:2"], [1])
    assert find_launch("cpu") == Launch(0, ["cpu"], [1])


def test_without_gpus_the_cpu_encodes(machine):
    machine(num_gpus=0)
    assert find_launch("auto") == Launch(0, ["cpu"], [1])


def test_one_of_a_machines_processes_takes_all_its_gpus(machine):
    """So that clips are dealt out to the GPUs of a machine as they ask, whatever launched it."""
    for local_rank, devices in enumerate((["cuda:0", "cuda:1", "cuda:2", "cuda:3"], [], [], [])):
        for machine_rank in range(2):
            machine(num_gpus=4, rank=4 * machine_rank + local_rank, world_size=8, local_rank=local_rank)
            assert find_launch("auto").devices == devices


@pytest.mark.parametrize("device", ["cuda:4", "cuda", "cuda:-1", "gpu"])
def test_device_that_is_not_there_is_refused(machine, device):
    machine(num_gpus=4)
    with pytest.raises(UserError, match=f"device={device}: this machine has 4 GPUs"):
        find_launch(device)


def clips(number):
    return [ClipRecord(f"{n:03d}", "t", f"/{n}.mp4", 0.0, None, "a rabbit") for n in range(number)]


@pytest.mark.parametrize(
    ("num_clips", "num_devices", "sizes"),
    [
        (10, [1], [10]),
        (10, [4, 0, 1, 0], [8, 0, 2, 0]),
        (3, [2, 2], [1, 2]),
        (0, [1, 1], [0, 0]),
        (1, [1] * 3, [0, 0, 1]),
    ],
)
def test_shares_go_by_devices_and_hold_every_clip_once(num_clips, num_devices, sizes):
    shares = share_out(clips(num_clips), num_devices)
    assert [len(share) for share in shares] == sizes
    assert [record for share in shares for record in share] == clips(num_clips)


class BrokenEngine:
    """Every GPU of this machine is broken."""

    def run(self):
        raise EncodersDied("the encoder on cuda:0 died 4 times")


def test_a_machine_whose_gpus_are_broken_does_not_end_the_others(capsys):
    failure = encode._run_to_the_end(BrokenEngine(), Launch(1, ["cuda:0"], [1, 1]))
    assert isinstance(failure, EncodersDied)
    assert "rank 1 stops encoding, the others go on: the encoder on cuda:0 died" in capsys.readouterr().out
    with pytest.raises(EncodersDied):
        encode._run_to_the_end(BrokenEngine(), Launch(0, ["cuda:0"], [1]))


@pytest.fixture
def two_machines(monkeypatch):
    monkeypatch.setattr(encode, "LOOK_AGAIN_SECONDS", 0.05)
    return Launch(0, ["cpu"], [1, 1])


HOLDER = """
import sys, time
from exvideo_train import locks
with locks.hold(__import__("pathlib").Path(sys.argv[1]), "", ""):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_first_rank_waits_for_one_that_lives(two_machines, tmp_path):
    path = encode._totals_path(tmp_path, 1)

    def other_rank():
        atomic_write_json(path, totals_to_json([Totals(num_encoded=3)]))

    with subprocess.Popen([sys.executable, "-c", HOLDER, path.with_suffix("")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        finishing = threading.Timer(1.0, other_rank)
        finishing.start()
        try:
            began = time.monotonic()
            totals, missing = encode._wait_for_others(tmp_path, two_machines)
        finally:
            holder.kill()
    assert time.monotonic() - began > 0.9
    assert (totals, missing) == ([Totals(num_encoded=3)], [])


def test_a_rank_that_was_killed_is_not_waited_for(two_machines, tmp_path, capsys):
    path = encode._totals_path(tmp_path, 1)
    with subprocess.Popen([sys.executable, "-c", HOLDER, path.with_suffix("")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
    assert encode._wait_for_others(tmp_path, two_machines) == ([], [1])
    assert "no figures from rank 1" in capsys.readouterr().out


def test_a_rank_that_never_showed_is_not_waited_for_long(two_machines, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SILENCE_SECONDS", 0.2)
    assert encode._wait_for_others(tmp_path, two_machines) == ([], [1])


def test_what_another_machine_left_over_is_said(store, capsys):
    (geometry,) = store.geometries()
    done = [store.read_index()[geometry.name, clip_id] for clip_id in store.clip_ids(geometry)[:2]]
    captions = {entry.clip_id: store.read(entry.clip_id, geometry).caption for entry in done}
    share = [ClipRecord(clip_id, "t", "/a.mp4", 0.0, None, caption) for clip_id, caption in captions.items()]
    settings = SimpleNamespace(geometry=geometry)
    encode._say_what_is_left(settings, store, [clips(3), share])
    assert capsys.readouterr().out == ""
    encode._say_what_is_left(settings, store, [[], [*share, *clips(3)], []])
    assert "rank 1 left 3 clips over" in capsys.readouterr().out
