"""Which of several processes this one is, on which machine's devices: under accelerate launch, torchrun or alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

from exvideo_train.errors import UserError


@dataclass(frozen=True)
class Launch:
    """This process among those that were launched together.

    Attributes:
        devices: what this process encodes on.
        num_local_encoders: on this machine, by all its processes together; they share its cores.
    """

    rank: int
    world_size: int
    devices: list[str]
    num_local_encoders: int


def find_launch(device: str) -> Launch:
    """Rank, number of ranks and this process's devices, under ``accelerate launch``, torchrun or none of them.

    Raises:
        UserError: a device that is not there.
    """
    import torch

    local_rank, num_local = 0, 1
    rank, world_size = 0, 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from datetime import timedelta

        from accelerate import PartialState

        # Over the CPU: coordinating needs no GPU memory. The first rank may plan a million clips meanwhile.
        state = PartialState(cpu=True, backend="gloo", timeout=timedelta(hours=6))
        rank, world_size = state.process_index, state.num_processes
        local_rank = state.local_process_index
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count()
    if device == "auto":
        mine = [f"cuda:{index}" for index in range(num_gpus) if index % num_local == local_rank % num_local]
        return Launch(rank, world_size, mine or ["cpu"], max(num_gpus, num_local))
    if device == "cpu" or (device.startswith("cuda:") and device[5:].isdigit() and int(device[5:]) < num_gpus):
        return Launch(rank, world_size, [device], num_local)
    raise UserError(f"device={device}: this machine has {num_gpus} GPUs; use device=auto, cpu or cuda:N")


def share_outcome(launch: Launch, outcome: str | None) -> None:
    """The first rank tells the others that the work list stands, or why not."""
    if launch.world_size == 1:
        return
    from accelerate.utils import broadcast_object_list

    box = [outcome]
    broadcast_object_list(box)
    if launch.rank != 0 and box[0] is not None:
        # The first rank prints the message.
        raise SystemExit(2)
