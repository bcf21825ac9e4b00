import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.models.normalisation import Normalisation
from exvideo_train.training.dataset import LatentDataset, MicroBatchPositions, collate
from exvideo_train.training.order import SampleOrder
from tests.unit.latents.conftest import GEOMETRY, fill, fingerprint_of

PORTRAIT = Geometry(17, 48, 32, 8)


def dataset_of(store, samples_per_step=(4,), geometries=(GEOMETRY,), **options):
    buckets = [(g, store.clip_ids(g)) for g in geometries]
    order = SampleOrder([len(ids) for _, ids in buckets], samples_per_step, seed=1)
    options = {"seed": 1, "num_levels": 1000, "caption_dropout": 0.0} | options
    return LatentDataset(store, buckets, order, **options)


def run(store, world_size, accumulation, steps, start=0, num_workers=0, **options):
    """Samples by position as `world_size` ranks see them."""
    seen = {}
    for rank in range(world_size):
        dataset = dataset_of(store, **options)
        positions = MicroBatchPositions(dataset.order, start, rank, world_size, accumulation)
        loader = iter(DataLoader(dataset, batch_sampler=positions, collate_fn=collate, num_workers=num_workers))
        for _ in range(steps * accumulation):
            batch = next(loader)
            for row, position in enumerate(batch.positions):
                assert position not in seen
                seen[position] = [batch.latents_BTCHW[row], batch.conditions["text_BLC"][row], batch.noise_BTCHW[row]]
                seen[position] += [batch.rows_B[row], batch.clip_ids[row]]
    return seen


def assert_same(a, b):
    assert a.keys() == b.keys()
    for position, values in a.items():
        for left, right in zip(values, b[position], strict=True):
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_samples_do_not_depend_on_ranks(store, world_size, accumulation):
    assert_same(run(store, 1, 1, steps=7), run(store, world_size, accumulation, steps=7))


def test_samples_do_not_depend_on_loader_workers(store):
    assert_same(run(store, 1, 1, steps=7), run(store, 2, 1, steps=7, num_workers=1))


def test_a_reader_born_as_a_new_process_gives_the_same(store):
    dataset = dataset_of(store)
    there = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(there[3].latents_TCHW, dataset[3].latents_TCHW)


def test_mixed_geometries_do_not_depend_on_ranks_and_resume(store):
    store.add_geometry(fingerprint_of(PORTRAIT))
    fill(store, PORTRAIT, 7)
    mixed = {"geometries": (GEOMETRY, PORTRAIT), "samples_per_step": (4, 2)}
    whole = run(store, 1, 1, steps=12, **mixed)
    assert_same(whole, run(store, 2, 1, steps=12, **mixed))
    first = run(store, 2, 1, steps=5, **mixed)
    rest = run(store, 1, 2, steps=7, start=len(first), **mixed)
    assert_same(whole, first | rest)
    assert {values[0].shape[0] for values in whole.values()} == {3, 5}


def test_an_epoch_uses_every_clip_once_across_world_sizes(store):
    clips = []
    for world_size, start in ((2, 0), (1, 4), (4, 8)):
        seen = run(store, world_size, 1, steps=1, start=start)
        clips += [values[4] for values in seen.values()]
    assert sorted(clips) == store.clip_ids(GEOMETRY)


def test_posterior_sample_is_that_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(1, 8, 3, 4, 6) * 3
    noise_TCHW = torch.randn(3, 4, 4, 6)
    posterior = DiagonalGaussianDistribution(moments)
    expected = (posterior.mean + posterior.std * noise_TCHW.transpose(0, 1)[None]) * 0.7
    assert torch.equal(Normalisation((0.7,)).latents(moments[0], noise_TCHW), expected[0].transpose(0, 1))


def test_caption_dropout_takes_the_empty_prompt(store):
    dataset = dataset_of(store, caption_dropout=0.5)
    dropped = [torch.equal(dataset[p].conditions["text_BLC"], store.empty_prompt()["text"]) for p in range(100)]
    assert 30 < sum(dropped) < 70
    assert all(dataset_of(store, caption_dropout=1.0)[p].conditions["text_BLC"].eq(0.5).all() for p in range(5))


def test_corrupt_clip_is_replaced_by_the_next_in_order(store, caplog):
    clean = dataset_of(store)
    bad, following, noise_TCHW = clean[2].clip_id, clean[3].clip_id, clean[2].noise_TCHW
    store.clip_path(bad, GEOMETRY).write_bytes(b"gone wrong")
    dataset = dataset_of(store, max_corrupt_clips=1)
    sample = dataset[2]
    assert (sample.clip_id, sample.replaced) == (following, (bad,))
    assert torch.equal(sample.noise_TCHW, noise_TCHW)
    assert bad in caplog.text
    assert dataset[3].clip_id == following
    other = dataset[5].clip_id
    store.clip_path(other, GEOMETRY).unlink()
    with pytest.raises(UserError, match="max_corrupt_clips=1"):
        dataset[5]


def test_all_clips_corrupt_ends_with_an_error(store):
    for clip_id in store.clip_ids(GEOMETRY):
        store.clip_path(clip_id, GEOMETRY).unlink()
    with pytest.raises(UserError, match="every clip"):
        dataset_of(store)[0]


def test_dataset_imports_no_encoder():
    script = (
        "import sys, exvideo_train.training.dataset, exvideo_train.latents.fingerprint\n"
        "heavy = {'diffusers', 'transformers', 'decord', 'av', 'cv2', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
