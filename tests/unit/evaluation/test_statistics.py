from __future__ import annotations

import numpy as np
import pytest

from morlaif_ray.evaluation.statistics import (
    bootstrap_means,
    length_statistics,
    mean_interval,
    paired_difference,
    pearson,
)

NAN = float("nan")


def test_the_interval_of_a_constant_is_the_constant():
    found = mean_interval(np.full(50, 0.25), num_resamples=100)
    assert (found.value, found.low, found.high, found.num) == (0.25, 0.25, 0.25, 50)


def test_the_interval_of_coin_flips_is_that_of_the_normal_approximation():
    # 250 ones of 400: standard error sqrt(0.625 * 0.375 / 400) = 0.0242.
    values = np.repeat([1.0, 0.0], [250, 150])
    found = mean_interval(values, seed=3)
    assert found.value == 0.625
    assert found.low == pytest.approx(0.625 - 1.96 * 0.0242, abs=0.004)
    assert found.high == pytest.approx(0.625 + 1.96 * 0.0242, abs=0.004)


def test_a_missing_value_is_left_out_and_never_zero():
    found = mean_interval(np.array([1.0, NAN, 1.0, NAN]), num_resamples=50)
    assert (found.value, found.low, found.num) == (1.0, 1.0, 2)


def test_no_value_at_all_gives_nan_with_num_zero():
    found = mean_interval(np.array([NAN, NAN]))
    assert np.isnan([found.value, found.low, found.high]).all()
    assert found.num == 0


def test_rows_of_one_prompt_are_resampled_together():
    # Two prompts: one with three wins, one with a single loss. A resample is (a,a), (a,b), (b,a) or (b,b), so its
    # mean is 1, 3/4 or 0 and the interval spans all of that; row by row it would be narrower.
    values = np.array([1.0, 1.0, 1.0, 0.0])
    found = mean_interval(values, groups_N=["a", "a", "a", "b"])
    assert found.value == 0.75
    assert (found.low, found.high, found.num) == (0.0, 1.0, 2)


def test_the_resamples_of_two_units_have_the_three_possible_means():
    means = bootstrap_means(np.array([3.0, 0.0]), np.array([3.0, 1.0]), num_resamples=4000, seed=1)
    assert set(means.tolist()) == {0.0, 0.75, 1.0}
    assert np.mean(means == 0.75) == pytest.approx(0.5, abs=0.03)


def test_the_memory_budget_changes_no_result():
    values = np.random.default_rng(0).normal(size=37)
    whole = bootstrap_means(values, np.ones(37), num_resamples=500, seed=9)
    pieces = bootstrap_means(
        values, np.ones(37), num_resamples=500, seed=9, max_chunk_elements=37 * 7
    )
    assert np.array_equal(whole, pieces)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(0).normal(size=80)
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5)
    assert mean_interval(values, seed=5) != mean_interval(values, seed=6)


def test_a_paired_difference_is_free_of_what_both_share():
    difficulty = np.linspace(-100.0, 100.0, 60)
    found = paired_difference(difficulty + 0.5, difficulty, num_resamples=200)
    assert found.value == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)


def test_a_pair_with_one_side_missing_is_left_out():
    found = paired_difference(np.array([1.0, NAN, 3.0]), np.array([0.0, 5.0, NAN]))
    assert (found.value, found.num) == (1.0, 1)


def test_unequal_lengths_of_paired_rows_are_our_bug():
    with pytest.raises(AssertionError, match="one to one"):
        paired_difference(np.zeros(2), np.zeros(3))


def test_lengths_are_described_by_mean_median_and_deciles():
    found = length_statistics(np.arange(11.0), np.array([True] * 2 + [False] * 9))
    assert (found.mean.value, found.median, found.p10, found.p90) == (5.0, 5.0, 1.0, 9.0)
    assert found.truncated_share == pytest.approx(2 / 11)


def test_no_lengths_give_nan():
    found = length_statistics(np.array([]))
    assert np.isnan([found.mean.value, found.median, found.truncated_share]).all()


def test_pearson_of_three_points_by_hand():
    # x - 2 = (-1, 0, 1), y - 2 = (-1, 1, 0): 1 / sqrt(2 * 2) = 0.5.
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)


def test_pearson_leaves_out_missing_rows_and_stands_huge_and_tiny_numbers():
    assert pearson(np.array([1.0, 2.0, NAN]), np.array([10.0, 20.0, 5.0])) == pytest.approx(1.0)
    assert pearson(np.array([1e-200, 2e-200, 3e-200]), np.array([3e200, 2e200, 1e200])) == -1.0


@pytest.mark.parametrize("second", [[2.0, 2.0], [1.0, NAN]])
def test_pearson_of_a_constant_or_of_one_row_is_nan(second):
    assert np.isnan(pearson(np.array([1.0, 2.0]), np.array(second)))
