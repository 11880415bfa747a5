"""Estimates with intervals: bootstrap over prompts, lengths, correlation. NumPy only, pure, seeded.

Legend: N rows, G independent units (prompts), R resamples. A missing value is NaN: it is left out and not counted,
never taken for 0. The unit of resampling is the prompt, because rows of one prompt are not independent.
Same values and same seed give the same interval, whatever the memory budget.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from morlaif_ray.types import FloatArray, Interval

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
MAX_CHUNK_ELEMENTS = 1 << 21
"""Drawn indices held at a time (16 MB): 10,000 x 4,000 of them at once would be 320 MB."""


@dataclass(frozen=True, slots=True)
class LengthStatistics:
    """Lengths of one policy's responses. Stands beside every win rate: judges tend to like longer text."""

    mean: Interval
    """Words per response."""
    median: float
    p10: float
    p90: float
    truncated_share: float
    """Share of responses cut off before their end; NaN where that was not recorded."""


def bootstrap_means(
    sums_G: FloatArray,
    counts_G: FloatArray,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
) -> FloatArray:
    """Means of R resamples [R] of G units, each with the sum and the number of its rows.

    A resample draws G units with replacement; its mean is the sum of their sums over the sum of their counts.
    """
    num_units = len(sums_G)
    assert num_units == len(counts_G)
    assert num_units > 0, "a bootstrap needs at least one unit"
    generator = np.random.default_rng(seed)
    rows = max(1, max_chunk_elements // num_units)
    means = np.empty(num_resamples)
    equal_counts = bool(np.all(counts_G == counts_G[0]))
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        drawn = generator.integers(0, num_units, size=(stop - start, num_units))
        total = sums_G[drawn].sum(axis=1)
        count = num_units * counts_G[0] if equal_counts else counts_G[drawn].sum(axis=1)
        means[start:stop] = total / count
    return means


def mean_interval(
    values_N: FloatArray,
    *,
    groups_N: Sequence[Hashable] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Mean of the present values with its percentile bootstrap interval over prompts.

    `groups_N` names the prompt of each row where a prompt has several; without it every row is a prompt of its own.
    `num` counts the prompts with at least one value. No value at all gives NaN with num 0.
    """
    values_N = np.asarray(values_N, dtype=np.float64)
    present = ~np.isnan(values_N)
    if not present.any():
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    sums_G, counts_G = _per_unit(values_N, present, groups_N)
    means = bootstrap_means(sums_G, counts_G, num_resamples=num_resamples, seed=seed)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    value = float(sums_G.sum() / counts_G.sum())
    return Interval(value, float(low), float(high), len(sums_G))


def paired_difference(
    first_N: FloatArray,
    second_N: FloatArray,
    *,
    groups_N: Sequence[Hashable] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of first - second over the same rows, resampled together; rows where either is missing are left out.

    Two methods answer the same prompts, so most of the prompts' difficulty cancels: the interval is much narrower
    than the two separate ones, and is the one to judge a difference by.
    """
    first_N, second_N = np.asarray(first_N, np.float64), np.asarray(second_N, np.float64)
    assert first_N.shape == second_N.shape, "paired rows must correspond one to one"
    return mean_interval(
        first_N - second_N, groups_N=groups_N, num_resamples=num_resamples, seed=seed
    )


def length_statistics(
    words_N: FloatArray,
    truncated_N: FloatArray | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> LengthStatistics:
    """Mean (with interval), median, 10th and 90th percentile of response lengths in words."""
    words_N = np.asarray(words_N, np.float64)
    present = words_N[~np.isnan(words_N)]
    mean = mean_interval(words_N, num_resamples=num_resamples, seed=seed)
    p10, median, p90 = np.percentile(present, [10, 50, 90]) if len(present) else [float("nan")] * 3
    cut = float("nan")
    if truncated_N is not None and len(truncated_N):
        cut = float(np.mean(np.asarray(truncated_N, np.float64)))
    return LengthStatistics(mean, float(median), float(p10), float(p90), cut)


def pearson(first_N: FloatArray, second_N: FloatArray) -> float:
    """Pearson correlation over rows where both are present; NaN with fewer than two of them or a constant side."""
    first_N, second_N = np.asarray(first_N, np.float64), np.asarray(second_N, np.float64)
    assert first_N.shape == second_N.shape, "correlated rows must correspond one to one"
    both = ~(np.isnan(first_N) | np.isnan(second_N))
    if both.sum() < 2:
        return float("nan")
    x, y = first_N[both], second_N[both]
    if np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    # Scaling first keeps the product of two small spreads from underflowing to 0 / 0.
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def measures_length(correlation: float) -> bool:
    """Whether length explains more than half of the variance of a model's scores (r squared above 0.5)."""
    return correlation * correlation > 0.5


def _per_unit(
    values_N: FloatArray, present: np.ndarray, groups_N: Sequence[Hashable] | None
) -> tuple[FloatArray, FloatArray]:
    """Sum and count of the present values of each unit, units in order of first appearance."""
    if groups_N is None:
        return values_N[present], np.ones(int(present.sum()))
    assert len(groups_N) == len(values_N)
    index: dict[Hashable, int] = {}
    unit_N = np.array([index.setdefault(group, len(index)) for group in groups_N], np.int64)
    sums_G = np.zeros(len(index))
    np.add.at(sums_G, unit_N[present], values_N[present])
    counts_G = np.bincount(unit_N[present], minlength=len(index)).astype(np.float64)
    return sums_G[counts_G > 0], counts_G[counts_G > 0]
