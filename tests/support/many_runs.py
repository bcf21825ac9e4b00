"""``many_runs.py SPECS.json``: several trainings one after another in one process group.

Starting a rank takes ten times as long as a tiny training. Every run here is prepared and trained by the same code as
``launch/train.py`` runs; only the process group stays. A spec is a JSON object:

    name            of the run
    overrides       of the train command
    stop_after      ask for a stop after this step, as a signal would
    disk_full       [first, last] step between which no file can grow past 64 KiB
    spoil_after     set a number of the adapter's weights to infinity after this step
    unequal         note whether a weight that differs on one rank is noticed
    fingerprint     note dtypes, a hash of the frozen weights before and after, and the modules imported
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import exvideo_train.training.job as job_module
from exvideo_train.config.commands import Train
from exvideo_train.entry import compose_config, to_dataclass
from exvideo_train.errors import UserError
from exvideo_train.parallel.mesh import Mesh, check_equal_weights, init_mesh
from exvideo_train.training.interruption import Interruption, end_process_after
from exvideo_train.training.job import Job, check_and_fetch_model, prepare
from exvideo_train.training.loggers import RunLogger
from exvideo_train.training.loop import Trainer
from exvideo_train.training.watchdog import Watchdog


class StopAfter(Interruption):
    """A stop that is asked for after a given step."""

    def __init__(self, step: int | None) -> None:
        super().__init__()
        self.stop_after = step
        self.trainer: Trainer | None = None

    @property
    def requested(self) -> bool:
        return self.stop_after is not None and self.trainer is not None and self.trainer.step >= self.stop_after

    @property
    def reason(self) -> str:
        return f"stop_after={self.stop_after}" if self.requested else ""


class Recorder(Trainer):
    """Notes which samples every step took; fills the disk or spoils the weights when told to."""

    disk_full: tuple[int, int] | None = None
    spoil_after: int | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[dict[str, Any]] = []

    def _next_batch(self) -> Any:
        batch = super()._next_batch()
        self.seen.append({"step": self.step + 1, "clip_ids": batch.clip_ids, "positions": batch.positions})
        return batch

    def _train_step(self) -> Any:
        result = super()._train_step()
        if self.step == self.spoil_after:
            self.engine._partitions()[0].detach()[0] = float("inf")
        return result

    def _save(self, *args: Any, **kwargs: Any) -> Any:
        if self.disk_full is None:
            return super()._save(*args, **kwargs)
        full = self.disk_full[0] <= self.step <= self.disk_full[1]
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (64 * 1024 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        try:
            return super()._save(*args, **kwargs)
        finally:
            thread = self.writer._thread
            if thread is not None:
                thread.join()
            limit_file_size(resource.RLIM_INFINITY)


def limit_file_size(num_bytes: int) -> None:
    """Writing past the limit fails with an OSError, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def frozen_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dtypes(model: nn.Module) -> dict[str, list[str]]:
    kinds: dict[str, set[str]] = {"trained": set(), "frozen": set()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        kinds["trained" if parameter.requires_grad else "frozen"].add(str(parameter.dtype))
    return {kind: sorted(found) for kind, found in kinds.items()}


def count_flops_once() -> None:
    """Counting FLOPs traces a step, every time a job is made; the runs here share a few geometries."""
    counted: dict[str, Any] = {}
    count = job_module.step_flops

    def count_once(*args: Any) -> Any:
        if repr(args) not in counted:
            counted[repr(args)] = count(*args)
        return counted[repr(args)]

    job_module.step_flops = count_once


def notices_unequal_weights(job: Job) -> bool:
    """Change one frozen number on the last rank, see whether all ranks notice, and change it back."""
    number = next(job.engine.module.parameters()).detach().view(-1)[:1]
    kept = number.clone()
    if job.mesh.rank == job.mesh.world_size - 1:
        number += 1
    try:
        check_equal_weights(job.engine.module, job.mesh)
    except UserError as error:
        return f"rank {job.mesh.world_size - 1} loaded other weights" in str(error)
    except SystemExit:
        return not job.mesh.is_main
    finally:
        number.copy_(kept)
    return False


@contextmanager
def one_wandb_at_a_time() -> Iterator[None]:
    """Two of wandb's services that started in the same moment have been seen to hang."""
    with open(Path(tempfile.gettempdir()) / "exvideo_train_wandb.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_one(spec: dict[str, Any], mesh: Mesh, config: Train) -> dict[str, Any]:
    messages: list[str] = []
    logger = RunLogger(Path(config.run_dir), config.logger, {"run_dir": config.run_dir}, mesh.is_main)
    show = logger.message

    def message(text: str) -> None:
        messages.append(text)
        show(text)

    logger.message = message  # type: ignore[method-assign]
    result: dict[str, Any] = {"messages": messages, "batches": [], "error": None, "status": None}
    trainer = None
    with Watchdog(mesh.rank, mesh.world_size, 0.0) as watchdog, StopAfter(spec.get("stop_after")) as interruption:
        try:
            job: Job = prepare(config, mesh, check_and_fetch_model(config, mesh), logger.message, watchdog.beat)
            trainer = interruption.trainer = Recorder(job, logger, watchdog, interruption)
            trainer.disk_full = tuple(spec["disk_full"]) if spec.get("disk_full") else None
            trainer.spoil_after = spec.get("spoil_after")
            if spec.get("fingerprint"):
                result["dtypes"] = dtypes(job.engine.module)
                result["frozen_before"] = frozen_hash(job.engine.module)
                result["modules"] = sorted(sys.modules)
            if spec.get("unequal"):
                result["unequal"] = notices_unequal_weights(job)
            for line in trainer.describe():
                logger.message(line)
            result["status"] = trainer.train()
            logger.close()
            if spec.get("fingerprint"):
                result["frozen_after"] = frozen_hash(job.engine.module)
        except UserError as error:
            result["error"] = str(error)
        except SystemExit as end:
            result["error"] = f"exit {end.code}"
    if trainer is not None:
        result["batches"] = trainer.seen
        result["num_skipped"], result["num_updates"] = trainer.num_skipped, trainer.num_updates
    mesh.barrier()
    return result


def main() -> None:
    spec_file = Path(sys.argv[1])
    count_flops_once()
    results = {}
    rank = 0
    for spec in json.loads(spec_file.read_text()):
        config = to_dataclass(compose_config("train", spec["overrides"], Train), Train)
        mesh = init_mesh(config.parallel.sequence, 300.0)
        rank = mesh.rank
        started = time.monotonic()
        with one_wandb_at_a_time() if config.logger.wandb else nullcontext():
            results[spec["name"]] = run_one(spec, mesh, config)
        if rank == 0:
            print(f"== {spec['name']}: {time.monotonic() - started:.1f} s", flush=True)
        gc.collect()
    spec_file.with_suffix(f".rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    end_process_after(main)
