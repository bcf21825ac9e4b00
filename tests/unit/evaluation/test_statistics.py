"""Verdicts against differences whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from exvideo_train.evaluation.measures import Better
from exvideo_train.evaluation.statistics import LEAST_PAIRS, NOT_TO_BE_TOLD, compare, pairs_needed

RANDOM = np.random.default_rng(1)
BASE = RANDOM.normal(100, 20, 20)
BETTER = BASE + RANDOM.normal(5, 2, 20)


@pytest.mark.parametrize(
    ("values", "direction", "verdict"),
    [
        (BETTER, Better.higher, "better"),
        (BETTER, Better.lower, "worse"),
        (BETTER, Better.neither, "higher"),
        (2 * BASE - BETTER, Better.neither, "lower"),
        (BASE + RANDOM.normal(0, 2, 20), Better.higher, NOT_TO_BE_TOLD),
        (BASE, Better.higher, NOT_TO_BE_TOLD),
    ],
)
def test_verdicts(values, direction, verdict):
    comparison = compare("sharpness", direction, values, BASE, seed=0)
    assert comparison.verdict == verdict
    assert comparison.num_pairs == 20
    assert comparison.low <= comparison.difference <= comparison.high


def test_pairing_counts_not_the_spread_of_prompts():
    """The prompts differ by 20, the variants by 5: unpaired this would not be told."""
    assert stats.ranksums(BETTER, BASE).pvalue > 0.05
    assert compare("x", Better.higher, BETTER, BASE, seed=0).p_value < 1e-4


def test_too_few_pairs_are_never_told_and_say_how_many_it_takes():
    comparison = compare("x", Better.higher, BETTER[:5], BASE[:5], seed=0)
    assert (comparison.verdict, comparison.num_needed) == (NOT_TO_BE_TOLD, LEAST_PAIRS)
    single = compare("x", Better.higher, BETTER[:1], BASE[:1], seed=0)
    assert (single.verdict, single.low, single.num_needed) == (NOT_TO_BE_TOLD, None, None)


def test_the_number_needed_has_the_power_it_promises():
    random = np.random.default_rng(2)
    effect = random.normal(0, 1, 400)
    effect = (effect - effect.mean()) / effect.std(ddof=1) + 0.5
    needed = pairs_needed(effect)
    told = stats.wilcoxon(random.normal(0.5, 1, (600, needed)), axis=1).pvalue < 0.05
    assert np.mean(told) == pytest.approx(0.8, abs=0.05)


def test_the_same_seed_gives_the_same_interval():
    first, again = (compare("x", Better.higher, BETTER, BASE, seed=3) for _ in range(2))
    assert first == again
