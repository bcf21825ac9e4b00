"""The training loop. One step reads top to bottom: batch, noise, prediction, loss, backward, update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import OmegaConf
from torch import Tensor

from exvideo_train.config.commands import Train
from exvideo_train.errors import UserError
from exvideo_train.extensions.provenance import make_provenance
from exvideo_train.files import atomic_write_text
from exvideo_train.locks import hold
from exvideo_train.models.noise_levels import denoising_loss
from exvideo_train.parallel.mesh import Mesh, init_mesh
from exvideo_train.randomness import generator_for
from exvideo_train.training.checkpoint import CheckpointWriter, TrainingState
from exvideo_train.training.curves import draw_curves
from exvideo_train.training.dataset import TrainingBatch
from exvideo_train.training.interruption import RESUME_STATUS, Interruption
from exvideo_train.training.job import (
    Job,
    batches,
    check_and_fetch_model,
    plain_config,
    prepare,
)
from exvideo_train.training.learning_rate import learning_rate
from exvideo_train.training.loggers import RunLogger, read_metrics
from exvideo_train.training.meters import SpeedMeter
from exvideo_train.training.resume import set_aside_later_checkpoints
from exvideo_train.training.sample_measures import SampleMeasures
from exvideo_train.training.samples import SampleProcess, environment
from exvideo_train.training.watchdog import Watchdog

ADAPTER_FILE = "adapter.safetensors"
EMA_ADAPTER_FILE = "adapter_ema.safetensors"


def run(config: Train) -> int:
    """Train, or go on training, in ``config.run_dir``; returns the exit status (0, or 75: run me again)."""
    mesh = init_mesh(config.parallel.sequence, config.safety.rank_timeout_seconds)
    logger = RunLogger(Path(config.run_dir), config.logger, plain_config(config), mesh.is_main)
    # Before the watchdog: a first download of the weights takes as long as it takes.
    model_path = check_and_fetch_model(config, mesh)
    with run_folder_held(config, mesh):
        # The watchdog inside: a launcher's signal must not end it before it has named the rank that failed.
        with (
            Interruption(config.safety.time_limit_minutes) as interruption,
            Watchdog(mesh.rank, mesh.world_size, config.safety.rank_timeout_seconds) as watchdog,
        ):
            job = prepare(config, mesh, model_path, logger.message, watchdog.beat)
            trainer = Trainer(job, logger, watchdog, interruption)
            for line in trainer.describe():
                logger.message(line)
            status = 0 if config.dry_run else trainer.train()
            # Leave together: rank 0 holds the watchdog's store.
            mesh.barrier()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if status == 0:
            # Alone: videos may take longer than ranks wait for one another.
            trainer.finish_samples()
        logger.close()
    return status


@contextmanager
def run_folder_held(config: Train, mesh: Mesh) -> Iterator[None]:
    """Rank 0 holds the run folder's lock; a dry run writes nothing and may look at one that is at work."""
    with ExitStack() as stack:
        if not config.dry_run:
            run_dir = Path(config.run_dir)
            remedy = "wait until it has ended, stop it (SIGTERM saves a checkpoint), or choose another run_dir"
            lock = hold(run_dir / "in_use", f"run_dir={run_dir}", remedy)
            mesh.main_first(lambda: stack.enter_context(lock) if mesh.is_main else None)
        yield


@dataclass
class StepResult:
    """One optimizer step, its tensors still on the device."""

    losses: list[Tensor] = field(default_factory=list)
    per_sample: list[tuple[tuple[str, ...], Tensor]] = field(default_factory=list)
    applied: bool = False
    grad_norm: float = math.nan
    lr: float = 0.0


class Trainer:
    """Runs a prepared job to ``max_steps``, or until it is asked to stop."""

    def __init__(self, job: Job, logger: RunLogger, watchdog: Watchdog, interruption: Interruption) -> None:
        self.job, self.logger, self.watchdog, self.interruption = job, logger, watchdog, interruption
        self.config, self.mesh, self.engine = job.config, job.mesh, job.engine
        self.run_dir = Path(self.config.run_dir)
        options = self.config.checkpoint
        self.writer = CheckpointWriter(self.run_dir, options.keep_last, options.keep_every, logger.message)
        self.meter = SpeedMeter(self.mesh.device, self.mesh.world_size, self.mesh.sequence_size, job.peak_flops)
        self.measures = SampleMeasures(self.run_dir, environment(), logger.message, self._record_samples)
        self.samples = SampleProcess(self.config, self.run_dir, logger.message, self.measures.add)
        state = job.checkpoint.state if job.checkpoint else TrainingState(0, 0, 0, 0, {})
        self.step, self.position = state.step, state.position
        self.num_updates, self.num_skipped = state.num_updates, state.num_skipped
        self.skipped_in_a_row = 0
        # This rank's, and those of all ranks that have been told.
        self.corrupt_clips: set[str] = set()
        self.reported_corrupt: set[str] = set()
        self.validated_step: int | None = None
        self.mean_loss: float | None = None

    def train(self) -> int:
        """The whole run; returns the exit status."""
        so_far = self.mesh.main_first(self._open_run_folder)
        self.mean_loss, self.validated_step = self.mesh.gather(so_far)[0]
        self.watchdog.beat("counting FLOPs")
        for geometry, _ in self.job.data.buckets:
            self.job.flops_per_sample(geometry)
        self.data = batches(self.job, self.position)
        results: list[StepResult] = []
        # Step 0, or a step whose validation gave way to an urgent save.
        if self._is_due(self.config.validation.every_steps) and self.validated_step != self.step:
            self._validate()
        self.meter.reset()
        while self.step < self.config.max_steps:
            results.append(self._train_step())
            stop = self.mesh.any(self.interruption.requested)
            save = stop or self._is_due(self.config.checkpoint.every_steps)
            # Before a checkpoint too, so that no record covers steps of both sides of a resume.
            last = self.step == self.config.max_steps
            if self._is_due(self.config.logger.log_every_steps) or not results[-1].applied or save or last:
                self._log(results)
                results = []
            if self._is_due(self.config.validation.every_steps) and not stop:
                self._validate()
            if save:
                self._save(wait=stop)
            if stop:
                # Rank 0 may hear of it last.
                reason = next(filter(None, self.mesh.gather(self.interruption.reason)))
                self.logger.message(f"stopped after step {self.step} ({reason}); the same command resumes")
                return RESUME_STATUS
            if self._is_due(self.config.validation.sample_every_steps):
                self._start_samples()
        self._finish()
        return 0

    def _open_run_folder(self) -> tuple[float | None, int | None] | None:
        """Rank 0 alone: config and records brought up to date; returns what the records so far tell."""
        if not self.mesh.is_main:
            return None
        atomic_write_text(self.run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(self.config)))
        set_aside_later_checkpoints(self.run_dir, self.step, self.logger.message)
        self.logger.start(self.step, self.config.max_steps, self.job.checkpoint.path if self.job.checkpoint else None)
        records = read_metrics(self.run_dir)
        self.measures.resume(self.step, records)
        return _from_records(records)

    def _train_step(self) -> StepResult:
        """One optimizer step."""
        job, engine, meter, beat = self.job, self.engine, self.meter, self.watchdog.beat
        result = StepResult(lr=learning_rate(self.step, self.config.max_steps, self.config.optim))
        for micro_step in range(self.config.optim.accumulation_steps):
            beat("reading data")
            with meter.phase("data"):
                batch = self._next_batch()
            beat("forward")
            with meter.phase("forward"):
                self._seed_dropout(micro_step)
                loss = denoising_loss(
                    engine, job.levels, batch.latents_BTCHW, batch.noise_BTCHW, batch.rows_B, batch.conditions
                )
            beat("backward")
            with meter.phase("backward"):
                engine.backward(loss.mean)
            beat("optimizer")
            with meter.phase("optimizer"):
                result.applied, result.grad_norm = engine.step(result.lr)
            result.losses.append(loss.mean.detach())
            result.per_sample.append((batch.clip_ids, loss.per_sample_B.detach()))
        self.step += 1
        self.num_updates += result.applied
        self.num_skipped += not result.applied
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        meter.add_step()
        return result

    def _next_batch(self) -> TrainingBatch:
        """The next micro-batch on the device; counts it for position, meter and corrupt clips."""
        try:
            batch = next(self.data)
        except UserError as error:
            # A worker process wraps its message into a traceback.
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from error
        except RuntimeError as error:
            # torch's words for a reader that was killed, by a full /dev/shm (Bus error) or for want of memory.
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a reader of data has died ({str(error).splitlines()[0]}): give the machine or container more memory "
                "and a larger /dev/shm, or lower data.num_workers (0 does without readers)"
            ) from error
        self.corrupt_clips.update(batch.replaced)
        num_samples = len(batch.clip_ids)
        geometry = self.job.data.buckets[self.job.data.order.locate(batch.positions[0])[0]][0]
        self.position += num_samples * self.mesh.data_size
        tokens, flops = self.job.family.grid.num_tokens(geometry), self.job.flops_per_sample(geometry)
        self.meter.add_samples(num_samples, num_samples * tokens, num_samples * flops)
        device = self.mesh.device
        return batch._replace(
            latents_BTCHW=batch.latents_BTCHW.to(device, non_blocking=True),
            conditions={name: value.to(device, non_blocking=True) for name, value in batch.conditions.items()},
            noise_BTCHW=batch.noise_BTCHW.to(device, non_blocking=True),
            rows_B=batch.rows_B.to(device, non_blocking=True),
        )

    def _seed_dropout(self, micro_step: int) -> None:
        """Dropout is a function of seed, step and rank, so that no random state needs saving."""
        if self.job.extension.has_dropout:
            place = f"dropout/{micro_step}/{self.mesh.rank}"
            torch.manual_seed(generator_for(self.config.seed, place, self.step).initial_seed())

    def _is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.step % every_steps == 0

    def _log(self, results: list[StepResult]) -> None:
        """One record for the steps since the last one; here the device is waited for."""
        last = results[-1]
        local = torch.stack([torch.stack(result.losses).double().mean() for result in results]).cpu()
        step_losses = (self.mesh.sum(local) / self.mesh.world_size).tolist()
        loss = sum(step_losses) / len(step_losses)
        clip_ids = self._report_bad_steps(results, step_losses)
        speed = self.meter.read()
        corrupt = set().union(*self.mesh.gather(self.corrupt_clips))
        values: dict[str, Any] = {
            "loss": loss,
            "grad_norm": last.grad_norm,
            "lr": last.lr,
            "epoch": self.job.data.order.epoch_of(self.position),
            "position": self.position,
            "skipped_updates": self.num_skipped,
            "corrupt_clips": len(corrupt),
            "speed": asdict(speed),
        }
        if clip_ids:
            values["clip_ids"] = clip_ids
        self.logger.record(self.step, values)
        self.logger.step_line(self.step, values)
        self.samples.poll()
        self.measures.poll()
        if new := sorted(corrupt - self.reported_corrupt):
            names = ", ".join(new)
            self.logger.message(f"step {self.step}: damaged or unreadable, replaced by the next in order: {names}")
            self.reported_corrupt |= corrupt
        if len(corrupt) > self.config.data.max_corrupt_clips:
            self._give_up(
                f"{len(corrupt)} latent files are damaged or cannot be read, more than data.max_corrupt_clips="
                f"{self.config.data.max_corrupt_clips}; which of both, and what to do, says "
                f"python -m exvideo_train.latents verify latents={self.config.latents}"
            )
        if not last.applied and self.mesh.any(not self.engine.holds_finite_weights()):
            # No later update is finite either: the gradient goes through the weights.
            self._give_up(self.writer.not_finite(self.step, "the adapter's weight"))
        if self.skipped_in_a_row > self.config.safety.max_nonfinite_steps:
            self._give_up(
                f"{self.skipped_in_a_row} updates in a row had a non-finite gradient (clips above and in "
                f"metrics.jsonl); the weights are those of the last good update and the last checkpoint is intact. "
                "Lower optim.lr, or remove the clips from the store; safety.max_nonfinite_steps sets the limit"
            )

    def _give_up(self, message: str) -> NoReturn:
        """End the run on all ranks, which agree on it; one of them tells why."""
        raise UserError(message) if self.mesh.is_main else SystemExit(2)

    def _report_bad_steps(self, results: list[StepResult], losses: list[float]) -> list[str]:
        """Tell skipped updates and loss spikes, each with its step and the clips of all ranks; returns the clips."""
        clip_ids: list[str] = []
        first = self.step - len(results) + 1
        for step, (result, loss) in enumerate(zip(results, losses, strict=True), start=first):
            factor = self.config.safety.loss_spike_factor
            spike = self.mean_loss is not None and math.isfinite(loss) and loss > factor * self.mean_loss
            if math.isfinite(loss):
                self.mean_loss = _smoothed(self.mean_loss, loss)
            if result.applied and not spike:
                continue
            own = [(i, float(x)) for ids, some in result.per_sample for i, x in zip(ids, some, strict=True)]
            everyone = dict(pair for pairs in self.mesh.gather(own) for pair in pairs)
            shown = ", ".join(f"{clip_id} ({value:.4g})" for clip_id, value in everyone.items())
            kind = f"loss spike: {loss:.4g}" if result.applied else "update skipped: non-finite gradient"
            self.logger.message(f"step {step}: {kind}; clips (losses): {shown}")
            clip_ids += everyone
        return clip_ids

    def _validate(self) -> None:
        """Score the held-out clips with the adapter and with its moving average; draw the curves."""
        validator = self.job.validator
        if validator is None:
            return
        record = {}
        names = ["validation"] + (["validation_ema"] if self.config.optim.ema_decay and self.step else [])
        for name in names:
            with self.engine.weights(averaged=name.endswith("ema")):
                result = validator.run(self.engine.module)
            record[name] = result.to_json()
            gap = "" if result.extension_gap is None else f", extension gap {result.extension_gap:.4f}"
            self.logger.message(f"step {self.step}: {name.replace('_', ', ')}: loss {result.loss:.4f}{gap}")
        self.logger.record(self.step, record)
        self._draw_curves()

    def _record_samples(self, step: int, values: dict[str, Any]) -> None:
        """Sample videos of an earlier step, measured meanwhile."""
        self.logger.record(step, values)
        self._draw_curves()

    def _draw_curves(self) -> None:
        if self.mesh.is_main:
            try:
                draw_curves(read_metrics(self.run_dir), self.run_dir / "curves.png")
            # UserError: somebody has damaged metrics.jsonl meanwhile; the next start asks to repair it.
            except (OSError, UserError) as error:
                self.logger.message(f"curves.png not written: {error}")

    def _state(self) -> TrainingState:
        options, clips = plain_config(self.config), self.job.data.sha256()
        counters = (self.step, self.position, self.num_updates, self.num_skipped)
        return TrainingState(*counters, options, clips, self.job.resumed_from, self.job.family.name)

    def _save(self, wait: bool) -> dict[str, dict[str, Tensor]]:
        """Copy the state to rank 0's host memory, then write it in the background."""
        self.watchdog.beat("copying the checkpoint")
        tensors = self.engine.gather_state()
        self.mesh.main_first(lambda: self.writer.save(self._state(), tensors, wait=wait) if self.mesh.is_main else None)
        self.watchdog.beat("checkpoint")
        return tensors

    def _start_samples(self) -> None:
        """Begin sample videos in a process of their own; whatever goes wrong there is told and harms nothing."""
        tensors = self.engine.gather_state([self.job.extension.name])
        if not self.mesh.is_main:
            return
        adapter = self.run_dir / "samples" / f"step_{self.step:08d}" / ADAPTER_FILE
        try:
            validator = self.job.validator
            captions = validator.captions(2) if validator and not self.config.validation.sample_prompts else []
            self._export(adapter, tensors[self.job.extension.name], "raw")
            self.samples.start(adapter, captions)
        except (UserError, OSError) as error:
            self.logger.message(f"no sample videos at step {self.step}: {error}")

    def _finish(self) -> None:
        """The last checkpoint and the adapter that other programs load."""
        tensors = self._save(wait=False)
        self.mesh.main_first(lambda: self._write_results(tensors) if self.mesh.is_main else None)
        self._draw_curves()
        self.logger.message(f"finished {self.step} steps; adapter: {self.run_dir / ADAPTER_FILE}")

    def finish_samples(self) -> None:
        """Wait for the last sample videos and their measures."""
        self.samples.finish()
        self.measures.finish(self.config.validation.sample_wait_minutes)

    def _write_results(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        self._export(self.run_dir / ADAPTER_FILE, tensors[self.job.extension.name], "raw")
        if "ema" in tensors:
            self._export(self.run_dir / EMA_ADAPTER_FILE, tensors["ema"], "ema")
        self.writer.finish(raise_error=True)

    def _export(self, path: Path, tensors: dict[str, Tensor], weights: str) -> None:
        options, family = self.config, self.job.family.name
        provenance = make_provenance(
            options.model.path, family, options.geometry, self.step, options.positions.value, weights=weights
        )
        self.job.extension.write(path, "diffusers", tensors, provenance)

    def describe(self) -> list[str]:
        """What will run, for the log."""
        data, mesh = self.job.data, self.mesh
        samples = ", ".join(
            f"{len(ids)} clips of {g.name} ({n} a step)"
            for (g, ids), n in zip(data.buckets, data.order.samples_per_step, strict=True)
        )
        num_trained = sum(parameter.numel() for parameter in self.engine.trainable.values())
        start = f"from step {self.step} ({self.job.checkpoint.path})" if self.job.checkpoint else "from step 0"
        return [
            f"model {self.config.model.path}, backbone {self.job.compute_dtype}, "
            f"{self.job.extension.describe()}: {num_trained:,} parameters in fp32",
            f"{mesh.world_size} ranks on {mesh.device.type} = {mesh.data_size} data x {mesh.sequence_size} sequence, "
            f"ZeRO-{self.config.memory.zero_stage}, recompute {self.config.memory.recompute.name}, "
            f"attention kernel {self.job.attention_kernel}",
            f"{samples}; {len(data.held_out)} held out",
            f"{start} to {self.config.max_steps} in {self.run_dir}",
        ]


def _smoothed(mean: float | None, loss: float) -> float:
    return loss if mean is None else 0.98 * mean + 0.02 * loss


def _from_records(records: list[dict[str, Any]]) -> tuple[float | None, int | None]:
    """The running mean that spikes are measured by, and the last step that was validated."""
    mean, validated = None, None
    for record in records:
        if record.get("loss") is not None:
            mean = _smoothed(mean, record["loss"])
        if "validation" in record:
            validated = record["step"]
    return mean, validated
