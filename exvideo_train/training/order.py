"""Which clip stands at which global position of a run: a function of seed, epoch and position alone.

Nothing here knows ranks or processes. A run counts the samples it has consumed; that one integer resumes it.

Clips of one geometry form a bucket, and a step takes samples of one bucket. Each bucket is an endless stream of
permutations of its clips, one an epoch. Steps cut consecutive groups from the streams; a group may cross the border
of two epochs, so every clip is seen exactly once an epoch whatever the group size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exvideo_train.errors import UserError

Indices = NDArray[np.int64]


class EpochOrder:
    """An endless stream of permutations of ``num_clips`` clips, one an epoch.

    Holds one permutation (8 bytes a clip) at a time.
    """

    def __init__(self, num_clips: int, seed: int, bucket: int = 0) -> None:
        if num_clips < 1:
            raise UserError("the sample order has no clips; encode some, or lower data.held_out_clips")
        self.num_clips = num_clips
        self.seed = seed
        self.bucket = bucket
        self._epoch = -1
        self._permutation: Indices = np.empty(0, np.int64)

    def clip_at(self, position: int) -> int:
        """Index of the clip at a position of the stream."""
        epoch, offset = divmod(position, self.num_clips)
        if epoch != self._epoch:
            self._permutation = permutation(self.num_clips, self.seed, f"clips {self.bucket}", epoch)
            self._epoch = epoch
        return int(self._permutation[offset])

    def clips(self, start: int, stop: int) -> list[int]:
        """Indices of the clips at positions ``start`` to ``stop - 1``."""
        return [self.clip_at(position) for position in range(start, stop)]


@dataclass(frozen=True)
class Step:
    """Samples of one optimizer step, all of one bucket.

    Attributes:
        index: steps before this one.
        position: samples consumed before this step; the global position of its first sample.
        bucket: index of the bucket.
        stream_position: position of its first sample in the bucket's own stream.
        num_samples: samples of the step over all ranks and micro-steps.
    """

    index: int
    position: int
    bucket: int
    stream_position: int
    num_samples: int


class SampleOrder:
    """The order of a run over one or several buckets.

    Args:
        bucket_sizes: number of clips of each bucket.
        samples_per_step: samples that a step of each bucket takes, over all ranks and micro-steps.
        seed: of the run.

    In an epoch each bucket gives as many steps as its clips fill (the rest is carried to the next epoch), and their
    sequence is shuffled, so that buckets come in proportion to their clips.
    """

    def __init__(self, bucket_sizes: Sequence[int], samples_per_step: Sequence[int], seed: int) -> None:
        assert len(bucket_sizes) == len(samples_per_step)
        if min(samples_per_step) < 1:
            raise UserError(f"samples_per_step={list(samples_per_step)}: each must be at least 1")
        self.bucket_sizes = list(bucket_sizes)
        self.samples_per_step = list(samples_per_step)
        self.seed = seed
        self.streams = [EpochOrder(n, seed, bucket) for bucket, n in enumerate(bucket_sizes)]
        self._epoch = -1
        self._step_bucket: Indices = np.empty(0, np.int64)
        self._step_group: Indices = np.empty(0, np.int64)
        self._step_position: Indices = np.empty(0, np.int64)

    def step(self, index: int) -> Step:
        """The step with ``index`` steps before it."""
        epoch = self._epoch_of(index, self._steps_before_epoch)
        self._prepare(epoch)
        return self._step_in_epoch(epoch, index - self._steps_before_epoch(epoch))

    def step_at(self, position: int) -> Step:
        """The step that holds the sample at a global position."""
        epoch = self._epoch_of(position, self._samples_before_epoch)
        self._prepare(epoch)
        return self._step_in_epoch(epoch, int(np.searchsorted(self._step_position, position, side="right")) - 1)

    def locate(self, position: int) -> tuple[int, int]:
        """(bucket, position in the bucket's stream) of the sample at a global position."""
        step = self.step_at(position)
        return step.bucket, step.stream_position + position - step.position

    def steps_from(self, position: int) -> Iterator[Step]:
        """Endless steps of a run that has consumed ``position`` samples.

        Raises:
            UserError: with several buckets, ``position`` is not the border of two steps: the run had another
                token budget or number of samples a step.
        """
        if len(self.streams) == 1:
            # One bucket has no borders: a run may go on with another number of samples a step.
            size = self.samples_per_step[0]
            index = -(-position // size)
            while True:
                yield Step(index, position, 0, position, size)
                index, position = index + 1, position + size
        step = self.step_at(position)
        if step.position != position:
            raise UserError(
                f"the run was stopped after {position} samples, which is inside a step of this run's mixed order "
                f"({self.samples_per_step} samples a step); resume with the token budget, ranks and accumulation "
                "steps of before"
            )
        index = step.index
        while True:
            yield self.step(index)
            index += 1

    def epoch_of(self, position: int) -> float:
        """Epochs consumed at a global position, as a fraction."""
        return position / sum(self.bucket_sizes)

    def _groups_before_epoch(self, epoch: int) -> list[int]:
        pairs = zip(self.bucket_sizes, self.samples_per_step, strict=True)
        return [epoch * clips // size for clips, size in pairs]

    def _steps_before_epoch(self, epoch: int) -> int:
        return sum(self._groups_before_epoch(epoch))

    def _samples_before_epoch(self, epoch: int) -> int:
        pairs = zip(self._groups_before_epoch(epoch), self.samples_per_step, strict=True)
        return sum(groups * size for groups, size in pairs)

    @staticmethod
    def _epoch_of(value: int, before_epoch: Callable[[int], int]) -> int:
        low, high = 0, 1
        while before_epoch(high) <= value:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if before_epoch(middle) <= value else (low, middle)
        return low

    def _prepare(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        first, last = self._groups_before_epoch(epoch), self._groups_before_epoch(epoch + 1)
        buckets = np.repeat(np.arange(len(first)), [b - a for a, b in zip(first, last, strict=True)])
        buckets = buckets[permutation(len(buckets), self.seed, "steps", epoch)]
        groups = np.empty_like(buckets)
        for bucket, start in enumerate(first):
            places = np.flatnonzero(buckets == bucket)
            groups[places] = start + np.arange(len(places))
        sizes = np.asarray(self.samples_per_step)[buckets]
        self._step_bucket, self._step_group = buckets, groups
        self._step_position = self._samples_before_epoch(epoch) + np.cumsum(sizes) - sizes
        self._epoch = epoch

    def _step_in_epoch(self, epoch: int, place: int) -> Step:
        bucket = int(self._step_bucket[place])
        size = self.samples_per_step[bucket]
        return Step(
            index=self._steps_before_epoch(epoch) + place,
            position=int(self._step_position[place]),
            bucket=bucket,
            stream_position=int(self._step_group[place]) * size,
            num_samples=size,
        )


def permutation(length: int, seed: int, purpose: str, epoch: int) -> Indices:
    """A permutation that depends on its arguments alone, whatever the version of NumPy.

    NumPy does not promise that a seeded generator gives the same numbers in later versions; sorting by a mix of
    integers (splitmix64) does.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}".encode(), digest_size=8).digest()
    key = np.uint64(int.from_bytes(digest, "little"))
    with np.errstate(over="ignore"):
        mixed = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable").astype(np.int64)


def samples_within_budget(num_tokens: int, token_budget: int) -> int:
    """Samples of so many video tokens that ``token_budget`` holds, at least one."""
    return max(1, token_budget // num_tokens)


def split_held_out(clip_ids: Sequence[str], num_held_out: int) -> tuple[list[str], list[str]]:
    """(training ids, held-out ids), each sorted; the same clips are held out whatever else the store holds.

    The clips with the smallest hash are held out, so that adding clips to a store replaces few of them. With several
    geometries pass the ids of all of them at once: a clip held out in one must not be trained on in another.

    Raises:
        UserError: nothing would be left to train on.
    """
    if num_held_out >= len(clip_ids):
        raise UserError(
            f"data.held_out_clips={num_held_out}: the store has {len(clip_ids)} clips of this geometry and none would "
            "be left to train on; lower data.held_out_clips or encode more clips"
        )
    ranked = sorted(clip_ids, key=lambda clip_id: hashlib.sha256(f"held out {clip_id}".encode()).digest())
    return sorted(ranked[num_held_out:]), sorted(ranked[:num_held_out])
