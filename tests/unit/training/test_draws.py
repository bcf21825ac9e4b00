"""Draws are functions of seed and global position alone."""

import subprocess
import sys

import torch

from exvideo_train.randomness import generator_for
from exvideo_train.training.draws import draw

SHAPE = (3, 16, 4, 6)


def test_equal_arguments_give_equal_draws_whatever_was_drawn_before():
    first = draw(6, 17, SHAPE, 1000, 0.1)
    torch.randn(5)
    draw(6, 18, SHAPE, 1000, 0.1)
    second = draw(6, 17, SHAPE, 1000, 0.1)
    assert torch.equal(first.noise_TCHW, second.noise_TCHW)
    assert torch.equal(first.posterior_noise_TCHW, second.posterior_noise_TCHW)
    assert first[2:] == second[2:]


def test_another_process_draws_the_same():
    code = (
        "import torch; torch.set_num_threads(1); from exvideo_train.training.draws import draw;"
        f"d = draw(6, 17, {SHAPE}, 1000, 0.1);"
        "print(d.row, d.drop_condition, d.noise_TCHW.double().sum().item())"
    )
    there = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    here = draw(6, 17, SHAPE, 1000, 0.1)
    assert there == [str(here.row), str(here.drop_condition), str(here.noise_TCHW.double().sum().item())]


def test_seed_position_and_purpose_each_matter():
    reference = draw(6, 17, SHAPE, 1000, 0.1)
    for other in (draw(7, 17, SHAPE, 1000, 0.1), draw(6, 18, SHAPE, 1000, 0.1)):
        assert not torch.equal(reference.noise_TCHW, other.noise_TCHW)
    assert not torch.equal(reference.noise_TCHW, reference.posterior_noise_TCHW)
    seeds = {generator_for(s, p, n).initial_seed() for s in range(3) for p in "ab" for n in range(50)}
    assert len(seeds) == 300


def test_draws_do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    draw(0, 0, SHAPE, 1000, 0.1)
    assert torch.equal(before, torch.get_rng_state())


def test_distributions_are_uniform_normal_and_ten_percent():
    draws = [draw(0, position, (1, 1, 1, 1), 1000, 0.1) for position in range(4000)]
    rows = torch.tensor([d.row for d in draws], dtype=torch.float64)
    assert rows.min() < 5
    assert rows.max() > 994
    counts = torch.histc(rows, bins=10, min=0, max=1000)
    assert ((counts - 400).square() / 400).sum() < 27.9  # chi-square with 9 degrees of freedom at p = 0.001
    assert abs(sum(d.drop_condition for d in draws) / 4000 - 0.1) < 0.015
    noise = torch.cat([d.noise_TCHW.flatten() for d in draws])
    assert abs(noise.mean()) < 0.06
    assert abs(noise.std() - 1) < 0.05
    assert not any(draw(0, position, (1,), 10, 0.0).drop_condition for position in range(100))
    assert all(draw(0, position, (1,), 10, 1.0).drop_condition for position in range(100))
