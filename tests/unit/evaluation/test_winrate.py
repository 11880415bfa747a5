from __future__ import annotations

import numpy as np

from morlaif_ray.evaluation.winrate import outcome_points, win_rate

NAN = float("nan")


def test_a_win_needs_both_orders_and_everything_else_is_a_tie():
    ab = np.array([2.0, 2.0, -1.0, -1.0, 0.0])
    ba = np.array([1.0, -1.0, 2.0, -3.0, 5.0])
    assert outcome_points(ab, ba).tolist() == [1.0, 0.5, 0.5, 0.0, 0.5]


def test_a_judge_that_always_prefers_the_first_given_makes_only_ties():
    ab, ba = np.full(20, 3.0), np.full(20, -3.0)
    found = win_rate(ab, ba, num_resamples=50)
    assert (found.wins, found.losses, found.ties) == (0, 0, 20)
    assert (found.interval.value, found.interval.low, found.interval.high) == (0.5, 0.5, 0.5)


def test_ties_count_half():
    # 3 wins, 1 loss, 2 ties of 6: (3 + 1) / 6.
    ab = np.array([1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    ba = np.array([1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    found = win_rate(ab, ba)
    assert (found.wins, found.losses, found.ties, found.num_prompts) == (3, 1, 2, 6)
    assert found.interval.value == 4 / 6
    assert found.interval.low < 4 / 6 < found.interval.high


def test_swapping_policy_and_opponent_mirrors_the_rate():
    rng = np.random.default_rng(0)
    ab, ba = rng.normal(0.3, 1, 200), rng.normal(0.3, 1, 200)
    one, two = win_rate(ab, ba), win_rate(-ab, -ba)
    assert (one.wins, one.losses, one.ties) == (two.losses, two.wins, two.ties)
    assert one.interval.value == 1.0 - two.interval.value


def test_an_order_within_the_tie_threshold_decides_nothing():
    assert outcome_points(
        np.array([0.04, 0.06]), np.array([3.0, 3.0]), tie_threshold=0.05
    ).tolist() == [0.5, 1.0]


def test_an_unusable_answer_is_missing_and_no_tie():
    found = win_rate(np.array([1.0, NAN, 1.0]), np.array([1.0, 1.0, NAN]), num_resamples=20)
    assert (found.wins, found.ties, found.num_missing, found.num_prompts) == (1, 0, 2, 1)
    assert (found.interval.value, found.interval.num) == (1.0, 1)
