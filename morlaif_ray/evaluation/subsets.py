"""Accuracy of several rewards on labelled pairs, by subset, with intervals over prompts.

Legend: N pairs, J rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morlaif_ray.evaluation.statistics import mean_interval
from morlaif_ray.types import FloatArray

ALL = "all"
"""The row over all subsets: every pair counts once."""


@dataclass(frozen=True)
class Rewarded:
    """What one model or scalarizer says of N pairs."""

    name: str
    kind: str
    """principle, baseline, scalarizer or control."""
    chosen_N: FloatArray
    """Scores of the responses that people chose; NaN where missing."""
    rejected_N: FloatArray


def subset_rows(
    rewards: Sequence[Rewarded],
    subsets: Sequence[str],
    prompts: Sequence[str],
    *,
    seed: int,
    num_resamples: int = 2000,
) -> list[dict[str, Any]]:
    """One row per subset and reward: share of pairs whose chosen response scores higher, ties half.

    A pair without both scores is left out of that reward's share and counted in `num_missing`.
    """
    records = []
    members = {name: [i for i, s in enumerate(subsets) if s == name] for name in sorted({*subsets})}
    for subset, rows in {ALL: list(range(len(subsets))), **members}.items():
        groups = [prompts[row] for row in rows]
        for reward in rewards:
            gap = reward.chosen_N[rows] - reward.rejected_N[rows]
            credit = np.where(np.isnan(gap), np.nan, 0.5 * (1.0 + np.sign(gap)))
            share = mean_interval(credit, groups_N=groups, num_resamples=num_resamples, seed=seed)
            records.append(
                {
                    "subset": subset,
                    "model": reward.name,
                    "kind": reward.kind,
                    "accuracy": share.value,
                    "low": share.low,
                    "high": share.high,
                    "num_pairs": int((~np.isnan(gap)).sum()),
                    "num_prompts": share.num,
                    "num_missing": int(np.isnan(gap).sum()),
                }
            )
    return records
