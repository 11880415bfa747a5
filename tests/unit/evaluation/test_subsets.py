"""Accuracy by subset, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from morlaif_ray.evaluation.subsets import Rewarded, subset_rows

pytestmark = pytest.mark.unit


def test_shares_by_subset_with_ties_half_and_missing_counted() -> None:
    reward = Rewarded(
        "linear",
        "scalarizer",
        np.array([1.0, 0.0, 2.0, math.nan, 5.0]),
        np.array([0.0, 1.0, 2.0, 1.0, 1.0]),
    )
    rows = subset_rows(
        [reward], ["x", "x", "y", "y", "y"], ["p", "q", "r", "s", "t"], seed=0, num_resamples=100
    )
    by_subset = {row["subset"]: row for row in rows}
    assert list(by_subset) == ["all", "x", "y"]
    assert by_subset["x"]["accuracy"] == 0.5
    assert by_subset["y"]["accuracy"] == 0.75  # a tie and a hit
    assert by_subset["all"]["accuracy"] == pytest.approx(2.5 / 4)
    assert (by_subset["y"]["num_pairs"], by_subset["y"]["num_missing"]) == (2, 1)
    assert by_subset["x"]["low"] <= 0.5 <= by_subset["x"]["high"]


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    scores = np.array([1.0, 1.0, 0.0, 0.0])
    reward = Rewarded("m", "principle", scores, np.full(4, 0.5))
    one, *_ = subset_rows([reward], ["x"] * 4, ["p"] * 4, seed=0, num_resamples=100)
    assert (one["low"], one["high"], one["num_prompts"]) == (0.5, 0.5, 1)
    many, *_ = subset_rows([reward], ["x"] * 4, list("pqrs"), seed=0, num_resamples=100)
    assert many["low"] < 0.5 < many["high"]
