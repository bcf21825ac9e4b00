"""Which devices a process of encode_latents takes, each once and unasked, and what it does when they are broken."""

import threading
from types import SimpleNamespace

import accelerate
import pytest
import torch

from exvideo_train.clips.record import ClipRecord
from exvideo_train.errors import UserError
from exvideo_train.latents import encode
from exvideo_train.latents.launch import Launch, find_launch
from exvideo_train.latents.supervise import EncodersDied
from exvideo_train.latents.work import WorkList


@pytest.fixture
def machine(monkeypatch):
    """Sets the number of GPUs, and what a launcher would: rank, ranks, local rank, local ranks."""

    def describe(num_gpus, rank=0, world_size=1, local_rank=0, num_local=1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        if world_size > 1:
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_local))
            state = SimpleNamespace(process_index=rank, num_processes=world_size, local_process_index=local_rank)
            monkeypatch.setattr(accelerate, "PartialState", lambda **options: state)

    return describe


def test_one_process_takes_every_gpu(machine):
    machine(num_gpus=4)
    assert find_launch("auto") == Launch(0, 1, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"], 4)
    assert find_launch("cuda:2") == Launch(0, 1, ["cuda:2"], 1)
    assert find_launch("cpu") == Launch(0, 1, ["cpu"], 1)


def test_without_gpus_the_cpu_encodes(machine):
    machine(num_gpus=0)
    assert find_launch("auto") == Launch(0, 1, ["cpu"], 1)


def test_two_processes_of_a_machine_share_its_gpus(machine):
    machine(num_gpus=4, rank=0, world_size=2, local_rank=0, num_local=2)
    assert find_launch("auto") == Launch(0, 2, ["cuda:0", "cuda:2"], 4)
    machine(num_gpus=4, rank=1, world_size=2, local_rank=1, num_local=2)
    assert find_launch("auto") == Launch(1, 2, ["cuda:1", "cuda:3"], 4)


def test_one_process_a_gpu_takes_its_own(machine):
    taken = []
    for rank in range(4):
        machine(num_gpus=4, rank=rank, world_size=4, local_rank=rank, num_local=4)
        launch = find_launch("auto")
        # The cores are shared out among all four, not among this process's own.
        assert launch.num_local_encoders == 4
        taken += launch.devices
    assert taken == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]


def test_one_process_a_machine_takes_all_gpus_of_its_machine(machine):
    for rank in range(2):
        machine(num_gpus=4, rank=rank, world_size=2, local_rank=0, num_local=1)
        assert find_launch("auto") == Launch(rank, 2, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"], 4)


@pytest.mark.parametrize("device", ["cuda:4", "cuda", "cuda:-1", "gpu"])
def test_device_that_is_not_there_is_refused(machine, device):
    machine(num_gpus=4)
    with pytest.raises(UserError, match=f"device={device}: this machine has 4 GPUs"):
        find_launch(device)


class BrokenSupervisor:
    """Every GPU of this machine is broken."""

    def run(self):
        raise EncodersDied("the encoder on cuda:0 died 4 times")


@pytest.fixture
def two_machines(store, monkeypatch):
    """A work list of one block that two machines share, and the first machine's attempt to run it to the end."""
    monkeypatch.setattr(encode, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(encode, "SILENCE_SECONDS", 0.5)
    work = WorkList(store.path)
    work.create([ClipRecord("abc", "test", "/a.mp4", 0.0, None, "a rabbit")], num_encoders=2)
    settings = SimpleNamespace(store_path=store.path)
    launch = Launch(0, 2, ["cuda:0"], 1)
    return work, lambda supervisor: encode._run_to_the_end(supervisor, settings, launch)


def test_no_encoder_is_started_to_wait_for_blocks_in_others_hands(two_machines):
    work, run_to_the_end = two_machines
    block = work.take("another machine")
    starts = []
    monitor = SimpleNamespace(run=lambda: starts.append(work.counts()))
    finishing = threading.Timer(0.4, lambda: work.finish(block))
    finishing.start()
    run_to_the_end(monitor)
    assert starts == [(0, 1)]


def test_a_machine_whose_gpus_are_broken_waits_for_the_others(two_machines, capsys):
    work, run_to_the_end = two_machines
    block = work.take("another machine")
    finishing = threading.Timer(0.8, lambda: work.finish(block))
    finishing.start()
    run_to_the_end(BrokenSupervisor())
    assert not finishing.is_alive()
    assert "rank 0 stops encoding, the others go on: the encoder on cuda:0 died" in capsys.readouterr().out


def test_a_machine_whose_gpus_are_broken_says_so_when_no_other_is_left(two_machines):
    _, run_to_the_end = two_machines
    with pytest.raises(EncodersDied):
        run_to_the_end(BrokenSupervisor())
