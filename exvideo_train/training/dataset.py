"""Stored clips -> training samples, by global position.

Reads files and draws noise; needs neither T5, VAE nor video reader.
Axis letters: B batch, C channel, T latent frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import UnusableLatent
from exvideo_train.latents.store import LatentStore, StoredClip
from exvideo_train.terminal import escaped
from exvideo_train.training.draws import draw
from exvideo_train.training.order import SampleOrder

_log = logging.getLogger(__name__)


class TrainingSample(NamedTuple):
    """One sample, on the CPU, ready for the objective.

    Attributes:
        latents_TCHW: float32, drawn from the posterior and scaled, in the DiT's axis order.
        conditions: the network's other inputs by their names there, without the batch axis; of the empty condition when
            it is dropped.
        noise_TCHW: float32 diffusion noise.
        row: of the model's noise levels.
        clip_id: of the clip that was used.
        position: global position of the sample in the run.
        replaced: ids of corrupt clips whose place this clip takes.
    """

    latents_TCHW: Tensor
    conditions: dict[str, Tensor]
    noise_TCHW: Tensor
    row: int
    clip_id: str
    position: int
    replaced: tuple[str, ...] = ()


class TrainingBatch(NamedTuple):
    """Samples of one geometry, stacked."""

    latents_BTCHW: Tensor
    conditions: dict[str, Tensor]
    noise_BTCHW: Tensor
    rows_B: Tensor
    clip_ids: tuple[str, ...]
    positions: tuple[int, ...]
    replaced: tuple[str, ...]


class LatentDataset(Dataset[TrainingSample]):
    """The sample at each global position of a run; ``dataset[position]`` for any position, however large.

    Args:
        store: the latent store.
        buckets: a geometry and its clip ids each, in the order that ``order`` numbers them.
        order: which clip stands where.
        seed: of the run, for noise, noise level and caption dropout.
        num_levels: rows of the model's noise levels.
        caption_dropout: share of samples that get the empty prompt.
        max_corrupt_clips: different corrupt clips that are replaced, in this process, before reading stops.
    """

    def __init__(
        self,
        store: LatentStore,
        buckets: Sequence[tuple[Geometry, Sequence[str]]],
        order: SampleOrder,
        *,
        seed: int,
        num_levels: int,
        caption_dropout: float,
        max_corrupt_clips: int = 100,
    ) -> None:
        assert [len(ids) for _, ids in buckets] == order.bucket_sizes
        self.store = store
        self.buckets = [(geometry, list(ids)) for geometry, ids in buckets]
        self.order = order
        self.seed = seed
        self.num_levels = num_levels
        self.caption_dropout = caption_dropout
        self.max_corrupt_clips = max_corrupt_clips
        self.corrupt_clips: set[str] = set()
        self.empty_prompt = store.empty_prompt()

    def __len__(self) -> int:
        """Clips of one epoch."""
        return sum(self.order.bucket_sizes)

    def __getitem__(self, position: int) -> TrainingSample:
        """The sample at a global position.

        Raises:
            UserError: more than ``max_corrupt_clips`` latent files are corrupt.
        """
        clip_id, stored, replaced = self._read_or_replace(position)
        random = draw(self.seed, position, self.store.latent_shape(stored), self.num_levels, self.caption_dropout)
        conditions = self.store.family.conditions(stored.tensors, self.empty_prompt, random.drop_condition)
        return TrainingSample(
            latents_TCHW=self.store.latents(stored, random.posterior_noise_TCHW),
            conditions={name: value.clone() for name, value in conditions.items()},
            noise_TCHW=random.noise_TCHW,
            row=random.row,
            clip_id=clip_id,
            position=position,
            replaced=replaced,
        )

    def _read_or_replace(self, position: int) -> tuple[str, StoredClip, tuple[str, ...]]:
        bucket, stream_position = self.order.locate(position)
        geometry, clip_ids = self.buckets[bucket]
        replaced: list[str] = []
        for offset in range(len(clip_ids)):
            clip_id = clip_ids[self.order.streams[bucket].clip_at(stream_position + offset)]
            try:
                return clip_id, self.store.read(clip_id, geometry), tuple(replaced)
            except UnusableLatent as error:
                replaced.append(clip_id)
                self._report(clip_id, error)
        raise UserError(
            f"latents={self.store.path}: every clip of {geometry.name} is damaged or cannot be read; which of "
            "both, and what to do, says "
            f"python -m exvideo_train.latents verify latents={self.store.path}"
        )

    def _report(self, clip_id: str, error: UnusableLatent) -> None:
        if clip_id not in self.corrupt_clips:
            self.corrupt_clips.add(clip_id)
            _log.warning("clip %s is replaced by the next in order: %s", clip_id, escaped(str(error)))
        if len(self.corrupt_clips) > self.max_corrupt_clips:
            raise UserError(
                f"{len(self.corrupt_clips)} latent files are damaged or cannot be read, more than "
                f"data.max_corrupt_clips={self.max_corrupt_clips}; the last: {error}. Which of both, and what to do, "
                f"says python -m exvideo_train.latents verify latents={self.store.path}"
            )


class MicroBatchPositions(Sampler[list[int]]):
    """Global positions of each micro-batch of one data-parallel rank, endless, from where a run stopped.

    The samples of a step are dealt out so that micro-step ``a`` of all ranks together holds the step's ``a``-th run
    of consecutive positions. Every rank gets the same number of samples in every micro-step of a step.

    Args:
        order: of the run.
        start_position: samples consumed so far.
        rank, world_size: of the data-parallel group.
        accumulation_steps: micro-steps of a step.

    Raises:
        UserError: a step's samples do not divide by ranks and micro-steps.
    """

    def __init__(
        self, order: SampleOrder, start_position: int, rank: int, world_size: int, accumulation_steps: int
    ) -> None:
        self.order = order
        self.start_position = start_position
        self.rank = rank
        self.world_size = world_size
        self.accumulation_steps = accumulation_steps
        units = world_size * accumulation_steps
        for size in order.samples_per_step:
            if size % units:
                raise UserError(
                    f"a step of {size} samples does not divide by {world_size} ranks x {accumulation_steps} "
                    "accumulation steps; choose optim.accumulation_steps so that it does"
                )

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.order.steps_from(self.start_position):
            size = step.num_samples // (self.world_size * self.accumulation_steps)
            for micro_step in range(self.accumulation_steps):
                start = step.position + (micro_step * self.world_size + self.rank) * size
                yield list(range(start, start + size))


def collate(samples: Sequence[TrainingSample]) -> TrainingBatch:
    """Stack samples of one geometry."""
    return TrainingBatch(
        latents_BTCHW=torch.stack([s.latents_TCHW for s in samples]),
        conditions={
            name: torch.stack([sample.conditions[name] for sample in samples]) for name in samples[0].conditions
        },
        noise_BTCHW=torch.stack([s.noise_TCHW for s in samples]),
        rows_B=torch.tensor([s.row for s in samples]),
        clip_ids=tuple(s.clip_id for s in samples),
        positions=tuple(s.position for s in samples),
        replaced=tuple(clip_id for s in samples for clip_id in s.replaced),
    )
