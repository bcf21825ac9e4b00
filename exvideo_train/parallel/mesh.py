"""Which rank works on which sample and on which slice of its sequence.

World ranks are laid out data-parallel group by data-parallel group: ranks ``d * sequence_size ... d * sequence_size +
sequence_size - 1`` share the samples of data rank ``d`` and, where possible, a node's fast links.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from exvideo_train.devices import gpus
from exvideo_train.errors import UserError

ResultT = TypeVar("ResultT")
_LONG = timedelta(hours=6)


@dataclass(frozen=True)
class Mesh:
    """This rank's place: data parallel times sequence parallel."""

    rank: int
    world_size: int
    sequence_size: int
    device: torch.device
    sequence_group: dist.ProcessGroup | None = None
    control_group: dist.ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a CPU tensor over all ranks; does not touch the device."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.control_group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes; does not touch the device."""
        return bool(self.sum(torch.tensor([float(flag)]))[0] > 0)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def main_first(self, work: Callable[[], ResultT]) -> ResultT:
        """Do ``work`` on rank 0, then on the others; a user's mistake found by rank 0 ends all, told once.

        Raises:
            UserError: on rank 0; the other ranks exit with status 2 and say nothing.
        """
        error: str | None = None
        if self.is_main:
            try:
                result = work()
            except UserError as problem:
                error = str(problem)
        error = self.gather(error)[0]
        if error is not None:
            if self.is_main:
                raise UserError(error)
            raise SystemExit(2)
        return result if self.is_main else work()

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        self.sum(torch.zeros(1))

    @property
    def data_size(self) -> int:
        """Number of groups that work on different samples."""
        return self.world_size // self.sequence_size

    @property
    def data_rank(self) -> int:
        """Which samples this rank works on."""
        return self.rank // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        """Which slice of the joint sequence this rank holds."""
        return self.rank % self.sequence_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def check_mesh(world_size: int, sequence_size: int, num_heads: int) -> None:
    """Raises UserError when the ranks or the heads cannot be divided by ``parallel.sequence``."""
    if sequence_size < 1 or world_size % sequence_size:
        raise UserError(
            f"parallel.sequence={sequence_size} does not divide the {world_size} ranks that were started; "
            f"start a multiple of {max(sequence_size, 1)} ranks or change parallel.sequence"
        )
    if sequence_size > 1 and not num_heads:
        raise UserError(f"parallel.sequence={sequence_size}: this model has no attention to share; use 1")
    if num_heads % sequence_size:
        raise UserError(
            f"parallel.sequence={sequence_size} does not divide the model's {num_heads} attention heads; "
            f"choose one of {[n for n in (1, 2, 3, 4, 6, 8, 12, 16) if num_heads % n == 0]}"
        )


def check_equal_weights(model: nn.Module, mesh: Mesh) -> None:
    """Every rank must start from the same weights, frozen ones included; sequence parallelism relies on it.

    Compared bit by bit, by a digest that depends on each number's place and is exact in any order of summing.

    Raises:
        UserError: on rank 0, when a rank holds others; the other ranks exit with status 2.
    """
    if mesh.world_size == 1:
        return
    digests = {name: _digest(parameter) for name, parameter in model.named_parameters()}
    everyone = mesh.gather(digests)
    mesh.main_first(lambda: _compare_digests(everyone))


def _compare_digests(everyone: list[dict[str, int]]) -> None:
    for rank, digests in enumerate(everyone):
        wrong = [name for name in everyone[0] if digests.get(name) != everyone[0][name]]
        if wrong:
            raise UserError(
                f"rank {rank} loaded other weights than rank 0 ({len(wrong)} tensors, first {wrong[0]}): model.path "
                "must hold the same files on every machine"
            )


def _digest(parameter: Tensor) -> int:
    bits = parameter.detach().flatten().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return int((bits.to(torch.int64) * places).sum())


def _join(backend: str, patience: timedelta) -> None:
    port = os.environ["MASTER_PORT"]
    try:
        dist.init_process_group(backend, timeout=patience)
    except (dist.DistError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT={port}: another process of this machine uses the port, another job perhaps; choose "
                "another: deepspeed --master_port 29501 ..., torchrun --master_port 29501 ..., or MASTER_PORT=29501"
            ) from error
        raise UserError(
            f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={port}: rank {os.environ['RANK']} of "
            f"{os.environ['WORLD_SIZE']} does not reach the others ({reason}); the launcher sets them (docs/launch.md)"
        ) from error


def init_mesh(sequence_size: int, rank_timeout_seconds: float) -> Mesh:
    """Join the process group that the launcher (deepspeed, torchrun, srun) described in the environment.

    A plain ``python launch/train.py`` is a world of one rank. NCCL on GPUs, gloo on CPUs.

    Args:
        sequence_size: ranks that share a sample.
        rank_timeout_seconds: the watchdog's; collectives wait twice as long, so that it speaks first. 0: no watchdog.

    Raises:
        UserError: the port is taken, or the ranks do not find one another.
    """
    patience = timedelta(seconds=max(60.0, 2 * rank_timeout_seconds)) if rank_timeout_seconds else _LONG
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ and "SLURM_NTASKS" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    if "SLURM_PROCID" in os.environ and torch.cuda.device_count() == 1:
        # Slurm was asked to show each task its own GPU only (--gpus-per-task=1).
        os.environ["LOCAL_RANK"] = "0"
    on_gpu = bool(gpus())
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        _join("nccl" if on_gpu else "gloo", patience)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if sequence_size < 1 or world_size % sequence_size:
        check_mesh(world_size, sequence_size, num_heads=sequence_size)
    group = None
    if sequence_size > 1:
        for start in range(0, world_size, sequence_size):
            ranks = list(range(start, start + sequence_size))
            created = dist.new_group(ranks, timeout=patience)
            if rank in ranks:
                group = created
    # Small host-side agreements (stop? finite?) go over gloo, so that they never wait for the device. What others wait
    # for here may be rank 0's download of the weights; a hang is the watchdog's to notice.
    control = dist.new_group(backend="gloo", timeout=_LONG) if world_size > 1 else None
    return Mesh(rank, world_size, sequence_size, device, group, control)
