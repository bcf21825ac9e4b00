"""Everything a run needs, checked and put together in order: cheap checks first, so that a mistake costs seconds."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from exvideo_train.config.commands import Train
from exvideo_train.config.experiment import plain_config
from exvideo_train.errors import UserError
from exvideo_train.extensions.extension import Extension
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import UnusableLatent
from exvideo_train.latents.fingerprint import model_fingerprint
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.family import Family
from exvideo_train.models.hub import resolve_model_path
from exvideo_train.models.noise_levels import NoiseLevels
from exvideo_train.models.registry import (
    backbone_config,
    backbone_family,
    check_geometries,
    likely_family,
    load_backbone,
)
from exvideo_train.parallel.engine import TrainingEngine
from exvideo_train.parallel.hardware import device_peak_flops
from exvideo_train.parallel.mesh import Mesh, check_equal_weights
from exvideo_train.parallel.parallelize import compute_dtype, parallelize
from exvideo_train.training.checkpoint import Checkpoint
from exvideo_train.training.dataset import LatentDataset, MicroBatchPositions, TrainingBatch, collate
from exvideo_train.training.flops import step_flops
from exvideo_train.training.interruption import obey_only_the_parent, stop_signals_held
from exvideo_train.training.order import SampleOrder, samples_within_budget, split_held_out
from exvideo_train.training.resume import check_same_run, find_checkpoint
from exvideo_train.training.validation import Validator

Log = Callable[[str], None]
# At most a quarter of a small store is held out, so that the experiments' defaults serve a handful of clips too.
LEAST_CLIPS_PER_HELD_OUT = 4
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_BYTES = 2**30


@dataclass(frozen=True)
class Data:
    """The store's clips, divided into training buckets and held-out clips."""

    store: LatentStore
    buckets: list[tuple[Geometry, list[str]]]
    held_out: list[str]
    order: SampleOrder

    def sha256(self) -> str:
        """Changes when the training clips do: then positions stand for other clips."""
        digest = hashlib.sha256()
        for geometry, clip_ids in self.buckets:
            digest.update(" ".join([geometry.name, *clip_ids, ""]).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Job:
    """What the loop works with."""

    config: Train
    mesh: Mesh
    model_path: Path
    family: Family[Any]
    data: Data
    levels: NoiseLevels
    extension: Extension
    engine: TrainingEngine
    attention_kernel: str
    checkpoint: Checkpoint | None
    validator: Validator | None
    compute_dtype: torch.dtype
    resumed_from: str
    """The checkpoint or run folder given as `resume`, from which this run once began; empty when it began by itself."""

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s that this rank's device can reach in the compute dtype; None where that is not known."""
        # The peaks known are those of bf16.
        return device_peak_flops(self.mesh.device) if self.compute_dtype is torch.bfloat16 else None

    @cache  # noqa: B019 (a process has one job)
    def flops_per_sample(self, geometry: Geometry) -> float:
        """FLOPs that one sample's forward and backward pass need; recomputation is work, but no progress."""
        return sum(step_flops(self.family, backbone_config(self.model_path), self.extension, geometry))


def check_and_fetch_model(config: Train, mesh: Mesh) -> Path:
    """Check the geometries, then find the model's folder, downloading what is missing of a hub id, on rank 0 first.

    Raises:
        UserError: an option, or the model.
    """
    mesh.main_first(lambda: check_geometries(config.trained_geometries, config.model.path))
    # Text encoder and VAE did their work offline.
    parts = likely_family(config.model.path).training_parts
    return mesh.main_first(lambda: resolve_model_path(config.model.path, config.model.revision, parts))


def open_data(config: Train, mesh: Mesh, model_path: Path, log: Log) -> Data:
    """Open the store, check that it fits, and divide its clips.

    Raises:
        UserError: no store, a store of another model or geometry, or too few clips.
    """
    family = backbone_family(model_path)
    for geometry in config.trained_geometries:
        family.grid.check(geometry)
    store = LatentStore.open(Path(config.latents))
    for geometry in config.trained_geometries:
        # Hashing the model's files takes a while: once, on rank 0.
        if mesh.is_main:
            store.require(model_fingerprint(model_path, geometry))
            _check_channels(store, geometry, model_path)
    ids = {geometry: store.clip_ids(geometry) for geometry in config.trained_geometries}
    everything = sorted({clip_id for clip_ids in ids.values() for clip_id in clip_ids})
    num_held_out = min(config.data.held_out_clips, len(everything) // LEAST_CLIPS_PER_HELD_OUT)
    if num_held_out < config.data.held_out_clips and mesh.is_main:
        log(
            f"data.held_out_clips={config.data.held_out_clips}: the store has {len(everything)} clips, "
            f"of which a quarter at most is held out: {num_held_out}"
        )
    training, held_out = split_held_out(everything, num_held_out)
    kept = set(training)
    buckets = [(geometry, [i for i in clip_ids if i in kept]) for geometry, clip_ids in ids.items()]
    for geometry, clip_ids in buckets:
        if not clip_ids and mesh.is_main:
            log(f"{geometry.name}: all its {len(ids[geometry])} clips are held out, none is left to train on")
    buckets = [(geometry, clip_ids) for geometry, clip_ids in buckets if clip_ids]
    budget = config.data.token_budget
    sizes = [family.grid.num_tokens(geometry) for geometry, _ in buckets]
    per_rank = [samples_within_budget(size, budget) if budget else config.data.batch_size for size in sizes]
    units = mesh.data_size * config.optim.accumulation_steps
    order = SampleOrder([len(clip_ids) for _, clip_ids in buckets], [n * units for n in per_rank], config.seed)
    return Data(store, buckets, held_out, order)


def prepare(config: Train, mesh: Mesh, model_path: Path, log: Log, beat: Callable[[str], None]) -> Job:
    """Check everything, load the backbone, add the adapter, build the engine, read the checkpoint.

    Args:
        model_path: what `check_and_fetch_model` returned.
        log: for notes to the user, called on every rank.
        beat: called when work goes on, for the watchdog.

    Raises:
        UserError: anything that a user can repair.
    """
    # 1. What needs no weights, on rank 0 first: files, fingerprint, checkpoint.
    beat("opening data")
    family = backbone_family(model_path)
    extension: Extension = mesh.main_first(lambda: family.extension().from_options(plain_config(config)))
    data = mesh.main_first(lambda: open_data(config, mesh, model_path, log))
    levels = family.noise_levels(model_path).to(mesh.device)
    checkpoint = _find_checkpoint(config, mesh, extension, data, log)
    # A run that goes on needs the file no more.
    initial = mesh.main_first(lambda: extension.initial(family.name)) if checkpoint is None else None

    # 2. The backbone straight onto the device, then the adapter, then what the checkpoint knows of it.
    beat("loading the backbone")
    dtype = compute_dtype(config.model.dtype)
    backbone = load_backbone(model_path, dtype, mesh.device, config.positions.value)
    mesh.main_first(lambda: extension.attach(backbone, config.seed))
    if checkpoint is not None:
        extension.load(backbone, checkpoint.tensors(extension.name), source=str(checkpoint.path))
    elif initial is not None:
        extension.load(backbone, initial.tensors, source=f"lora.init={config.lora.init}")
        log(f"training begins from {initial.describe()}")
    backbone.train()

    # 3. Parallel forms, then the engine, which broadcasts rank 0's weights and shards the optimizer.
    beat("building the engine")
    kernel = mesh.main_first(lambda: parallelize(backbone, config.memory, mesh, dtype, extension.has_dropout))
    check_equal_weights(backbone, mesh)
    engine = TrainingEngine(backbone, extension.trained(backbone), config, mesh, extension.name)
    if checkpoint is not None:
        load_optimizer(engine, checkpoint)
    validator = _validator(config, mesh, data, levels, model_path, log, beat)
    resumed_from = checkpoint.state.resumed_from if checkpoint else ""
    if config.resume not in ("auto", "never"):
        resumed_from = str(Path(config.resume).resolve())
    return Job(
        config,
        mesh,
        model_path,
        family,
        data,
        levels,
        extension,
        engine,
        kernel,
        checkpoint,
        validator,
        dtype,
        resumed_from,
    )


def _find_checkpoint(config: Train, mesh: Mesh, extension: Extension, data: Data, log: Log) -> Checkpoint | None:
    """The checkpoint that the run goes on from, if any; what has changed since is told.

    Raises:
        UserError: it is broken, or of a run that was another.
    """
    found = mesh.main_first(lambda: find_checkpoint(Path(config.run_dir), config.resume, log))
    if found is None:
        return None
    notes = mesh.main_first(lambda: check_same_run(found.state.config, plain_config(config), extension.shape_options))
    for note in notes:
        log(f"option changed since the checkpoint: {note}")
    if found.state.clips_sha256 != data.sha256():
        log(
            "the training clips of the store have changed since the checkpoint: the run goes on with the new ones, "
            "and some clips may come twice or not at all in this epoch"
        )
    return found


def load_optimizer(engine: TrainingEngine, checkpoint: Checkpoint) -> None:
    """Moments, moving average and step count of a checkpoint into the engine."""
    files = {key: checkpoint.open(key) for key in engine.state_keys()[1:]}
    engine.load_optimizer_state(lambda key, name: files[key].get_tensor(name), checkpoint.state.num_updates)


def _validator(
    config: Train,
    mesh: Mesh,
    data: Data,
    levels: NoiseLevels,
    model_path: Path,
    log: Log,
    beat: Callable[[str], None],
) -> Validator | None:
    """The validator of the longest geometry, or None with the reason told."""
    if not config.validation.every_steps or not config.data.held_out_clips:
        return None
    if not data.held_out:
        log("no validation: the store has too few clips to hold any out")
        return None
    geometry = max((g for g, _ in data.buckets), key=lambda g: g.num_frames)
    in_geometry = set(data.store.clip_ids(geometry))
    clip_ids = [clip_id for clip_id in data.held_out if clip_id in in_geometry]
    if len(data.buckets) > 1:
        log(f"validation is of {geometry.name}, the longest geometry: {len(clip_ids)} of {len(data.held_out)} clips")
    if not clip_ids:
        log(f"no validation: none of the {len(data.held_out)} held-out clips is stored as {geometry.name}")
        return None
    damaged: dict[str, str] = mesh.gather(_damaged(data.store, clip_ids, geometry) if mesh.is_main else None)[0]
    for clip_id, why in damaged.items():
        log(f"validation goes on without {clip_id}: {why}")
    clip_ids = [clip_id for clip_id in clip_ids if clip_id not in damaged]
    if not clip_ids:
        log("no validation: every held-out clip is damaged")
        return None
    family = backbone_family(model_path)
    base = replace(geometry, num_frames=family.num_base_frames(backbone_config(model_path)))
    return Validator(
        data.store,
        clip_ids,
        geometry,
        levels,
        num_quantiles=config.validation.timestep_quantiles,
        base_latent_frames=family.grid.shape_THW(base)[0],
        mesh=mesh,
        on_progress=lambda: beat("validation"),
        log=log,
    )


def _check_channels(store: LatentStore, geometry: Geometry, model_path: Path) -> None:
    """A fingerprint only says what a store claims: its tensors must fit the network too."""
    needed = backbone_family(model_path).stored_channels(backbone_config(model_path))
    held = store.channels(geometry)
    if held is not None and held != needed:
        has, needs = (", ".join(f"{name} {number}" for name, number in c.items()) for c in (held, needed))
        raise UserError(
            f"latents={store.path}: the tensors of {geometry.name} have these channels: {has}, this model needs "
            f"{needs}: the store is not what its fingerprint says; encode it again"
        )


def _damaged(store: LatentStore, clip_ids: list[str], geometry: Geometry) -> dict[str, str]:
    """The clips that cannot be read, and why."""
    damaged = {}
    for clip_id in clip_ids:
        try:
            store.read(clip_id, geometry)
        except UnusableLatent as error:
            damaged[clip_id] = str(error)
    return damaged


def batches(job: Job, position: int) -> Iterator[TrainingBatch]:
    """This data rank's micro-batches from a global position on, for ever, read ahead by worker processes."""
    config, mesh = job.config, job.mesh
    dataset = LatentDataset(
        job.data.store,
        job.data.buckets,
        job.data.order,
        seed=config.seed,
        num_levels=len(job.levels),
        caption_dropout=config.data.caption_dropout,
        max_corrupt_clips=config.data.max_corrupt_clips,
    )
    positions = MicroBatchPositions(
        job.data.order, position, mesh.data_rank, mesh.data_size, config.optim.accumulation_steps
    )
    workers = config.data.num_workers
    _check_shared_memory(workers, mesh)
    loader: DataLoader[TrainingBatch] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=positions,
        collate_fn=collate,
        num_workers=workers,
        # A worker forked from a process with GPU and communication threads can deadlock.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=mesh.device.type == "cuda",
        worker_init_fn=_start_worker,
    )
    with stop_signals_held():
        return iter(loader)


def _check_shared_memory(num_workers: int, mesh: Mesh) -> None:
    """Batches travel through /dev/shm; a container that asked for no more has 64 MB, three batches of one rank.

    Raises:
        UserError: it is too small or not writable. Torch would wait for a batch that a reader could not send.
    """
    if not num_workers or sys.platform != "linux":
        return
    remedy = "start the container with --ipc=host (or --shm-size=8g), or set data.num_workers=0"
    try:
        tempfile.TemporaryFile(dir=SHARED_MEMORY).close()
        total = shutil.disk_usage(SHARED_MEMORY).total
    except OSError as error:
        raise UserError(f"{SHARED_MEMORY} is not writable ({error.strerror}): {remedy}") from error
    if mesh.device.type == "cuda" and total < LEAST_SHARED_BYTES:
        raise UserError(
            f"{SHARED_MEMORY} has {total / 2**20:.0f} MiB, too little for data.num_workers={num_workers}: {remedy}"
        )


def _start_worker(worker: int) -> None:
    obey_only_the_parent()
