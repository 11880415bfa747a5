"""Shares with 95% bootstrap intervals, resampled over prompts.

Legend: N pairs, C prompts, J compared columns, R resamples.
All columns of one call share their resamples, so that differences between them are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from morlaif_ray.errors import DataError
from morlaif_ray.types import FloatArray, IntArray, Interval

NUM_ACCURACY_RESAMPLES = 2000
COVERAGE = (2.5, 97.5)  # percent
_CHUNK_ENTRIES = 2_000_000  # resample counts held at a time: 16 MB


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """Means of J columns and their bootstrap distribution."""

    value_J: FloatArray
    resampled_RJ: FloatArray
    num: int
    """Prompts behind the estimates."""

    def interval(self, column: int) -> Interval:
        low, high = np.percentile(self.resampled_RJ[:, column], COVERAGE)
        return Interval(float(self.value_J[column]), float(low), float(high), self.num)

    def difference(self, column: int, other: int) -> Interval:
        """`column` minus `other` over the same resamples."""
        gap_R = self.resampled_RJ[:, column] - self.resampled_RJ[:, other]
        low, high = np.percentile(gap_R, COVERAGE)
        value = float(self.value_J[column] - self.value_J[other])
        return Interval(value, float(low), float(high), self.num)


def pair_credit(reward_a_N: FloatArray, reward_b_N: FloatArray, labels_N: FloatArray) -> FloatArray:
    """1 where the response that the person chose has the higher reward, 0 where the lower, 0.5 for a tie."""
    agreement_N = np.sign(reward_a_N - reward_b_N) * (2.0 * labels_N - 1.0)
    return np.asarray(0.5 * (1.0 + agreement_N))


def bootstrap_shares(
    values_NJ: FloatArray,
    prompt_ids: Sequence[str],
    seed: int,
    num_resamples: int = NUM_ACCURACY_RESAMPLES,
) -> Shares:
    """Mean over pairs of each column, resampled over prompts (all pairs of a drawn prompt come along)."""
    if len(values_NJ) == 0:
        raise DataError("no pairs to estimate a share from; collect human labels for split 'test'")
    cluster_N, num_clusters = cluster_index(prompt_ids)
    sums_CJ = np.zeros((num_clusters, values_NJ.shape[1]))
    np.add.at(sums_CJ, cluster_N, values_NJ)
    sizes_C = np.bincount(cluster_N, minlength=num_clusters).astype(np.float64)
    resampled = [
        (counts_RC @ sums_CJ) / (counts_RC @ sizes_C)[:, None]
        for counts_RC in resample_counts(num_clusters, num_resamples, seed)
    ]
    return Shares(values_NJ.mean(axis=0), np.concatenate(resampled), num_clusters)


def resample_counts(num_units: int, num_resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each unit is drawn in each resample, [R, C], in chunks along R."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ENTRIES // num_units)
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        drawn = rng.integers(0, num_units, (rows, num_units)) + np.arange(rows)[:, None] * num_units
        counts = np.bincount(drawn.ravel(), minlength=rows * num_units)
        yield counts.reshape(rows, num_units).astype(np.float64)


def cluster_index(prompt_ids: Sequence[str]) -> tuple[IntArray, int]:
    """The number of each pair's prompt, in order of first appearance, and how many prompts there are."""
    known: dict[str, int] = {}
    index = [known.setdefault(prompt_id, len(known)) for prompt_id in prompt_ids]
    return np.array(index, dtype=np.int64), len(known)
