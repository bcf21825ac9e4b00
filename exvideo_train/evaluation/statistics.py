"""Whether a difference between two variants can be told, and if not, how many videos it would take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from exvideo_train.evaluation.measures import Better

SIGNIFICANCE, POWER, CONFIDENCE = 0.05, 0.8, 0.95
_NUM_RESAMPLES = 2000
# Fewer pairs cannot give the signed-rank test a p under 0.05: of five, all in one direction, it is 2 / 2^5 = 0.0625.
LEAST_PAIRS = 6
# Against a paired t-test of normal differences Wilcoxon's needs 1 / 0.955 times the pairs.
_WILCOXON_EFFICIENCY = 3 / math.pi
_MOST_NEEDED = 1_000_000
NOT_TO_BE_TOLD = "not to be told"


@dataclass(frozen=True)
class Comparison:
    """One measure of one variant against the baseline, over pairs of one prompt and seed each.

    Attributes:
        num_pairs: pairs in which both videos have the measure.
        mean, baseline_mean: of the two variants over these.
        difference: mean of variant less baseline.
        low, high: its 95 % bootstrap interval, None of fewer than two pairs.
        p_value: of Wilcoxon's signed-rank test, two-sided; None where all differences are zero.
        verdict: "better", "worse", for measures without a good direction "higher" or "lower", or "not to be told".
        num_needed: pairs with which the difference seen would be told with 80 % chance, None where none was seen or
            more than a million.
    """

    measure: str
    num_pairs: int
    mean: float
    baseline_mean: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    verdict: str
    num_needed: int | None


def compare(measure: str, better: Better, values: Sequence[float], baseline: Sequence[float], seed: int) -> Comparison:
    """Paired comparison; a verdict takes both a p under 0.05 and an interval without zero.

    Args:
        values, baseline: of the same pairs in the same order, at least one.
        seed: of the bootstrap.
    """
    first, second = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    differences = first - second
    low, high = _interval(differences, seed)
    p_value = _p_value(differences)
    is_told = (
        p_value is not None
        and p_value < SIGNIFICANCE
        and low is not None
        and high is not None
        and (low > 0 or high < 0)
    )
    return Comparison(
        measure=measure,
        num_pairs=len(differences),
        mean=float(first.mean()),
        baseline_mean=float(second.mean()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_value=p_value,
        verdict=_word(better, float(differences.mean())) if is_told else NOT_TO_BE_TOLD,
        num_needed=pairs_needed(differences),
    )


def _word(better: Better, difference: float) -> str:
    if better is Better.neither:
        return "higher" if difference > 0 else "lower"
    return "better" if (difference > 0) == (better is Better.higher) else "worse"


def _interval(differences: np.ndarray, seed: int) -> tuple[float | None, float | None]:
    if len(differences) < 2:
        return None, None
    if np.ptp(differences) == 0:
        # Of equal differences every resample is the same.
        return float(differences[0]), float(differences[0])
    result = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=_NUM_RESAMPLES,
        confidence_level=CONFIDENCE,
        # BCa, the default, divides by zero on samples of few distinct values.
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _p_value(differences: np.ndarray) -> float | None:
    if not differences.any():
        return None
    return float(stats.wilcoxon(differences).pvalue)


def pairs_needed(differences: np.ndarray) -> int | None:
    """Pairs for 80 % power at the effect observed, by the normal approximation; None if that cannot be said."""
    if len(differences) < 2:
        return None
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    if mean == 0:
        return None
    z = stats.norm.isf(SIGNIFICANCE / 2) + stats.norm.isf(1 - POWER)
    # Guenther's term makes up for the deviation, which few pairs do not know.
    needed = ((z * deviation / mean) ** 2 + stats.norm.isf(SIGNIFICANCE / 2) ** 2 / 2) / _WILCOXON_EFFICIENCY
    return max(LEAST_PAIRS, math.ceil(needed)) if needed <= _MOST_NEEDED else None
