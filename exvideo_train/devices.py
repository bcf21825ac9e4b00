"""Which devices this machine has, and a GPU that torch cannot use told from none: that must not become a CPU run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from exvideo_train.errors import UserError

# 9.15.0, as cuDNN counts.
NEWEST_UNSOUND_CUDNN = 91_500
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# Oldest driver that runs a CUDA release, by its major version (CUDA's release notes, minor-version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


def gpus() -> list[str]:
    """Names of all GPUs, ``cuda:0`` and so on; empty where there are none, or where none is wanted.

    None is wanted with ``DS_ACCELERATOR=cpu`` and with an empty ``CUDA_VISIBLE_DEVICES``.

    Raises:
        UserError: there is a GPU, or torch is built for one, and torch cannot use it; says what it takes.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return []
    if problem := _why_unusable():
        raise UserError(f"{problem}; to compute on the CPU all the same, set DS_ACCELERATOR=cpu")
    return []


def _why_unusable() -> str:
    """Empty where nothing speaks for a GPU: a build of torch for the CPU, on a machine without NVIDIA's driver."""
    driver, built_for = _driver_version(), torch.version.cuda
    if built_for is None:
        if driver is None:
            return ""
        return (
            f"this machine has an NVIDIA GPU (driver {driver}), but torch {torch.__version__} is built for the CPU: "
            "install a build for CUDA"
        )
    oldest = OLDEST_DRIVER.get(int(built_for.split(".")[0]), max(OLDEST_DRIVER.values()))
    if driver is None:
        return (
            f"torch {torch.__version__} is built for CUDA {built_for}, but no NVIDIA driver is here: it takes driver "
            f"{oldest} or newer, and in a container --gpus all"
        )
    if int(driver.split(".")[0]) < oldest:
        return (
            f"the NVIDIA driver {driver} is too old for torch {torch.__version__}, built for CUDA {built_for}: it "
            f"takes driver {oldest} or newer, or a torch for an older CUDA"
        )
    return (
        f"torch {torch.__version__}, built for CUDA {built_for}, sees no GPU although driver {driver} is here: "
        "`nvidia-smi` tells why (no GPU given to this job or container, or a GPU in error)"
    )


def _driver_version() -> str | None:
    """Of NVIDIA's kernel module; None where it is not loaded."""
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?(\d[\d.]*)", NVIDIA_DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else "0"


def cudnn_version() -> str:
    """Of the cuDNN that is loaded, which need not be the one that torch brought: LD_LIBRARY_PATH comes first."""
    version = torch.backends.cudnn.version() or 0
    return f"{version // 10_000}.{version // 100 % 100}.{version % 100}"


def cudnn_is_sound() -> bool:
    """Whether it is newer than 9.15.0: up to it, attention is wrong at lengths that 128 does not divide, and bf16
    convolutions in 3D fall back to kernels that are several times slower."""
    return (torch.backends.cudnn.version() or 0) > NEWEST_UNSOUND_CUDNN


def choose_devices(names: str) -> list[str]:
    """Of an option ``device=``: ``auto`` is every GPU, or the CPU where there is none; else names with commas between.

    Raises:
        UserError: no such device here.
    """
    if names == "auto":
        return gpus() or ["cpu"]
    devices = [name.strip() for name in names.split(",")]
    # By name: to try one out would take some of its memory for the rest of this process.
    here = gpus() if any(name != "cpu" for name in devices) else []
    for name in devices:
        if name != "cpu" and name not in here:
            raise UserError(f"device={name}: this machine has {len(here)} GPUs; use device=auto, cpu or cuda:N")
    return devices
