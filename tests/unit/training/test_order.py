from collections import Counter

import pytest

from exvideo_train.errors import UserError
from exvideo_train.training.dataset import MicroBatchPositions
from exvideo_train.training.order import (
    EpochOrder,
    SampleOrder,
    permutation,
    samples_within_budget,
    split_held_out,
)


def test_each_epoch_holds_every_clip_once_in_another_order():
    order = EpochOrder(97, seed=3)
    epochs = [order.clips(97 * epoch, 97 * (epoch + 1)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(97)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_epoch_and_position_alone():
    forward = EpochOrder(50, seed=1).clips(0, 150)
    order = EpochOrder(50, seed=1)
    assert [order.clip_at(p) for p in reversed(range(150))] == forward[::-1]
    assert EpochOrder(50, seed=2).clips(0, 150) != forward


def test_permutation_never_changes_between_versions():
    # Runs of older versions must resume with the same order: these numbers may never change.
    assert permutation(8, 6, "clips 0", 0).tolist() == [4, 3, 5, 2, 7, 1, 0, 6]


def test_permutation_is_uniform_enough():
    counts = Counter(int(permutation(5, seed, "clips 0", 0)[0]) for seed in range(2000))
    assert all(330 < counts[i] < 470 for i in range(5))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_same_steps(world_size):
    order = SampleOrder([40, 23], [8, 24], seed=0)
    steps = 30
    seen = []
    iterators = [iter(MicroBatchPositions(order, 0, r, world_size, 8 // world_size)) for r in range(world_size)]
    for index in range(steps):
        positions = [p for it in iterators for _ in range(8 // world_size) for p in next(it)]
        step = order.step(index)
        assert sorted(positions) == list(range(step.position, step.position + step.num_samples))
        assert {order.locate(p)[0] for p in positions} == {step.bucket}
        seen += sorted(positions)
    assert seen == list(range(len(seen)))


def test_mixed_buckets_see_every_clip_once_an_epoch():
    order = SampleOrder([40, 23, 5], [8, 3, 2], seed=0)
    counts = Counter()
    steps = order.steps_from(0)
    # 8 * 3 * 2 epochs are a whole number of groups in every bucket.
    while len(counts) < 68 or sum(counts.values()) < 48 * 68:
        step = next(steps)
        stream = order.streams[step.bucket]
        for clip in stream.clips(step.stream_position, step.stream_position + step.num_samples):
            counts[step.bucket, clip] += 1
    assert sum(counts.values()) == 48 * 68
    assert set(counts.values()) == {48}


def test_mixed_order_resumes_at_every_step():
    order = SampleOrder([10, 7], [4, 3], seed=5)
    whole = [next_step for next_step, _ in zip(order.steps_from(0), range(60), strict=False)]
    for step in whole:
        assert next(SampleOrder([10, 7], [4, 3], seed=5).steps_from(step.position)) == step
        assert order.step_at(step.position + step.num_samples - 1) == step


def test_mixed_order_refuses_a_position_inside_a_step():
    order = SampleOrder([10, 7], [4, 3], seed=5)
    with pytest.raises(UserError, match="token budget"):
        next(order.steps_from(1))


def test_single_bucket_resumes_anywhere_with_another_batch():
    eight, four = SampleOrder([30], [8], seed=0), SampleOrder([30], [4], seed=0)
    steps = eight.steps_from(12)
    assert [next(steps).position for _ in range(3)] == [12, 20, 28]
    assert [eight.locate(p) for p in range(90)] == [four.locate(p) for p in range(90)]


def test_step_must_divide_by_ranks():
    with pytest.raises(UserError, match="accumulation_steps"):
        MicroBatchPositions(SampleOrder([30], [6], seed=0), 0, 0, 4, 1)


def test_token_budget():
    long, short = 44_550, 17_550
    assert samples_within_budget(long, 44_550) == 1
    assert samples_within_budget(short, 44_550) == 2
    assert samples_within_budget(long, 1) == 1


def test_held_out_clips_stay_held_out_when_the_store_grows():
    ids = [f"{i:04x}" for i in range(200)]
    train, held_out = split_held_out(ids[:100], 10)
    assert sorted(train + held_out) == ids[:100]
    grown_train, grown = split_held_out(ids, 10)
    assert not set(grown) & set(grown_train)
    assert len(set(grown) & set(held_out)) >= 2
    with pytest.raises(UserError, match="held_out_clips=5"):
        split_held_out(ids[:5], 5)
