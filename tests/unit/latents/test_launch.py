"""Which devices a process of encode_latents takes: every GPU of its machine, unasked, and each once."""

from types import SimpleNamespace

import accelerate
import pytest
import torch

from exvideo_train.errors import UserError
from exvideo_train.latents.encode import Launch, find_launch


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
    assert find_launch("auto") == Launch(0, 1, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"])
    assert find_launch("cuda:2") == Launch(0, 1, ["cuda:2"])
    assert find_launch("cpu") == Launch(0, 1, ["cpu"])


def test_without_gpus_the_cpu_encodes(machine):
    machine(num_gpus=0)
    assert find_launch("auto") == Launch(0, 1, ["cpu"])


def test_two_processes_of_a_machine_share_its_gpus(machine):
    machine(num_gpus=4, rank=0, world_size=2, local_rank=0, num_local=2)
    assert find_launch("auto") == Launch(0, 2, ["cuda:0", "cuda:2"])
    machine(num_gpus=4, rank=1, world_size=2, local_rank=1, num_local=2)
    assert find_launch("auto") == Launch(1, 2, ["cuda:1", "cuda:3"])


def test_one_process_a_gpu_takes_its_own(machine):
    taken = []
    for rank in range(4):
        machine(num_gpus=4, rank=rank, world_size=4, local_rank=rank, num_local=4)
        taken += find_launch("auto").devices
    assert taken == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]


def test_one_process_a_machine_takes_all_gpus_of_its_machine(machine):
    for rank in range(2):
        machine(num_gpus=4, rank=rank, world_size=2, local_rank=0, num_local=1)
        assert find_launch("auto") == Launch(rank, 2, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"])


@pytest.mark.parametrize("device", ["cuda:4", "cuda", "cuda:-1", "gpu"])
def test_device_that_is_not_there_is_refused(machine, device):
    machine(num_gpus=4)
    with pytest.raises(UserError, match=f"device={device}: this machine has 4 GPUs"):
        find_launch(device)
