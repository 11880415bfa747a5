"""The arithmetic of the learning curve; the benchmark itself trains models."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.active_selection import make_world
from benchmarks.active_selection_results import Settings, curve_rows, page, summary, t_interval

pytestmark = pytest.mark.unit
SETTINGS = Settings("backbone", (100, 200), 1000, 500, 4, 60, 1e-3, 0.5)


def seed_of(random: float, active: float) -> dict:
    """Accuracy 0.6 with the seed set, then these, the same for all 12 principles."""
    return {
        "accuracy": {
            "random": [[0.6] * 12, [random] * 12],
            "ensemble_disagreement": [[0.6] * 12, [active] * 12],
        },
        "variance_ratio": [2.0],
        "mean_abs_log_odds": {"random": 1.0, "ensemble_disagreement": 1.5},
    }


def test_three_seeds_have_students_interval_of_two_degrees_of_freedom() -> None:
    # Mean 2, standard deviation 1: half width 4.303 / sqrt(3).
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0 - 2.4844, 2.0 + 2.4844), abs=1e-3)
    assert math.isnan(t_interval([1.0])[1])


def test_the_difference_is_taken_seed_by_seed() -> None:
    results = [seed_of(0.70, 0.72), seed_of(0.60, 0.62), seed_of(0.65, 0.67)]
    rows = curve_rows([seed["accuracy"] for seed in results], [100, 200])
    last = rows[-1]
    assert (last["strategy"], last["num_pairs"]) == ("ensemble_disagreement", 200)
    assert last["num_judgements"] == 2400
    assert last["accuracy"] == pytest.approx(0.67)
    # Every seed gains 0.02: no spread, though the accuracies themselves spread by 0.05.
    assert (last["difference"], last["difference_low"]) == pytest.approx((0.02, 0.02))
    figures = summary(rows, results, SETTINGS)
    assert (figures["gain_mean"], figures["gain_low"]) == (0.02, 0.02)
    text = page(rows, results, SETTINGS, figures, "curve.png", "a GPT-2")
    assert "active selection is better" in text
    assert "| 100 | 0.6000 [0.6000, 0.6000] |" in text


def test_a_difference_whose_interval_holds_zero_is_called_none() -> None:
    results = [seed_of(0.70, 0.72), seed_of(0.60, 0.58), seed_of(0.65, 0.66)]
    rows = curve_rows([seed["accuracy"] for seed in results], [100, 200])
    text = page(rows, results, SETTINGS, summary(rows, results, SETTINGS), "c.png", "a GPT-2")
    assert "no difference can be told" in text


def test_a_world_holds_different_responses_with_noisy_and_true_labels() -> None:
    world = make_world(20, 0, 0.5)
    assert len(world.pair_ids) == len(set(world.pair_ids)) == 20
    assert world.judged_NK.shape == world.truth_NK.shape == (20, 12)
    assert 0.2 < float(np.std(world.judged_NK - world.truth_NK)) < 0.8
    assert all(a != b for a, b in zip(world.texts_a, world.texts_b, strict=True))
