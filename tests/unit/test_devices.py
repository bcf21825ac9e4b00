"""Devices, and a GPU that torch cannot use, by what the driver and torch say of themselves."""

from __future__ import annotations

import pytest
import torch

from exvideo_train import devices
from exvideo_train.errors import UserError

DRIVER_535 = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
DRIVER_580 = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine that torch sees no GPU on; called with the driver's own words and what torch is built for."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def make(driver: str | None, built_for: str | None) -> None:
        path = tmp_path / "version"
        if driver is not None:
            path.write_text(driver)
        monkeypatch.setattr(devices, "NVIDIA_DRIVER", path)
        monkeypatch.setattr(torch.version, "cuda", built_for)

    return make


@pytest.mark.parametrize(
    ("driver", "built_for", "words"),
    [
        (DRIVER_535, None, ["driver 535.104.05", "built for the CPU", "install a build for CUDA"]),
        (DRIVER_580, None, ["driver 580.65.06", "built for the CPU"]),
        (DRIVER_535, "13.0", ["driver 535.104.05 is too old", "CUDA 13.0", "driver 580 or newer"]),
        (DRIVER_535, "12.8", ["sees no GPU although driver 535.104.05 is here", "nvidia-smi"]),
        (DRIVER_580, "13.0", ["sees no GPU although driver 580.65.06 is here"]),
        (None, "13.0", ["no NVIDIA driver is here", "driver 580 or newer", "--gpus all"]),
        ("words of another kind", "13.0", ["driver 0 is too old"]),
    ],
)
def test_a_gpu_that_torch_cannot_use_stops_and_says_what_it_takes(machine, driver, built_for, words, monkeypatch):
    machine(driver, built_for)
    with pytest.raises(UserError) as refusal:
        devices.choose_devices("auto")
    assert all(word in str(refusal.value) for word in [*words, "DS_ACCELERATOR=cpu"])
    # Whoever wants the CPU says so.
    assert devices.choose_devices("cpu") == ["cpu"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert devices.choose_devices("auto") == ["cpu"]
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.choose_devices("auto") == ["cpu"]


def test_without_anything_of_nvidia_the_cpu_is_meant(machine):
    machine(None, None)
    assert devices.gpus() == []
    assert devices.choose_devices("auto") == ["cpu"]
    assert devices.choose_devices("cpu, cpu") == ["cpu", "cpu"]


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "cpu,nonsense"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match=f"device={name.split(',')[-1]}: this machine has 0 GPUs"):
        devices.choose_devices(name)


@pytest.mark.parametrize(
    ("version", "text", "is_sound"),
    [(None, "0.0.0", False), (91_002, "9.10.2", False), (91_500, "9.15.0", False), (91_501, "9.15.1", True)],
)
def test_cudnn_is_judged_by_the_library_that_is_loaded(monkeypatch, version, text, is_sound):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert (devices.cudnn_version(), devices.cudnn_is_sound()) == (text, is_sound)
