"""Logistic regression, its change of scale, bootstrap and shares."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from morlaif_ray.errors import DataError
from morlaif_ray.reward import Normaliser, scalarize
from morlaif_ray.reward.bootstrap import bootstrap_shares, pair_credit, resample_counts
from morlaif_ray.reward.regression import RIDGE, fit_regression, refit


def fit(pairs, num_bootstrap=50, **options):
    return fit_regression(
        pairs.differences_NK,
        pairs.labels_N,
        pairs.prompt_ids,
        pairs.principles,
        num_bootstrap=num_bootstrap,
        seed=1,
        **options,
    )


def sklearn_fit(features_NK, labels_N, counts_N=None):
    model = LogisticRegression(
        C=1 / RIDGE, fit_intercept=False, solver="newton-cholesky", tol=1e-10
    )
    return model.fit(features_NK, labels_N, sample_weight=counts_N).coef_[0]


def test_the_fit_finds_the_true_weights_within_its_intervals(pairs, true_weights):
    found = fit(pairs(4000, seed=3), num_bootstrap=200)
    per_spread = found.coefficient_K / found.diff_scale_K * np.array([1.0, 0.1, 5.0, 2.0])
    np.testing.assert_allclose(per_spread, true_weights, atol=0.12)
    assert (found.low_K < found.coefficient_K).all()
    assert (found.coefficient_K < found.high_K).all()
    assert found.high_K[3] < 0.0  # the principle that people value negatively


def test_linear_on_normalised_scores_ranks_exactly_as_the_logit(pairs):
    train, test = pairs(500, seed=3), pairs(400, seed=4)
    found = fit(train)
    normaliser = Normaliser.fit(
        train.scores_a_NK * 3.0 + 1.0, train.principles
    )  # any reference sample
    weight_K = found.coefficient_K * found.weight_factor_K(normaliser.std_K)
    reward_a = scalarize("linear", normaliser.apply(test.scores_a_NK), weight_K)
    reward_b = scalarize("linear", normaliser.apply(test.scores_b_NK), weight_K)
    logit_N = found.logit(test.differences_NK)
    np.testing.assert_allclose(reward_a - reward_b, logit_N, atol=1e-9)
    np.testing.assert_array_equal(reward_a > reward_b, logit_N > 0.0)


def test_swapping_the_responses_of_pairs_changes_nothing(pairs):
    train = pairs(300, seed=5)
    flip_N = np.random.default_rng(0).random(300) < 0.5
    sign_N1 = np.where(flip_N, -1.0, 1.0)[:, None]
    swapped = fit_regression(
        train.differences_NK * sign_N1,
        np.where(flip_N, 1.0 - train.labels_N, train.labels_N),
        train.prompt_ids,
        train.principles,
        num_bootstrap=20,
        seed=1,
    )
    original = fit(train, num_bootstrap=20)
    np.testing.assert_allclose(swapped.coefficient_K, original.coefficient_K, rtol=1e-7)
    np.testing.assert_allclose(swapped.diff_scale_K, original.diff_scale_K)
    np.testing.assert_allclose(swapped.low_K, original.low_K, rtol=1e-6)


def test_many_refits_at_once_equal_scikit_learn_one_by_one(pairs):
    train = pairs(300, seed=6)
    features_NK = train.differences_NK / np.array([1.0, 0.1, 5.0, 2.0])
    signed_NK = features_NK * (2.0 * train.labels_N - 1.0)[:, None]
    counts_RN = np.concatenate(list(resample_counts(300, 8, seed=2)))
    assert (counts_RN.sum(axis=1) == 300).all()
    for found, counts_N in zip(refit(signed_NK, counts_RN), counts_RN, strict=True):
        expected = sklearn_fit(features_NK, train.labels_N, counts_N)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_refits_without_principles_equal_scikit_learn_on_the_rest(pairs):
    train = pairs(300, seed=6)
    features_NK = train.differences_NK / np.array([1.0, 0.1, 5.0, 2.0])
    signed_NK = features_NK * (2.0 * train.labels_N - 1.0)[:, None]
    active_RK = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]], dtype=bool)
    for found, active_K in zip(refit(signed_NK, active_RK=active_RK), active_RK, strict=True):
        assert (found[~active_K] == 0.0).all()
        expected = sklearn_fit(features_NK[:, active_K], train.labels_N)
        np.testing.assert_allclose(found[active_K], expected, rtol=1e-5)


def test_refits_stay_finite_on_separable_resamples():
    rng = np.random.default_rng(0)
    signed_NK = np.abs(rng.normal(size=(30, 3))) * 50.0
    assert np.isfinite(refit(signed_NK, np.ones((4, 30)))).all()


def test_separable_labels_are_refused_with_advice(pairs):
    train = pairs(25, seed=7)
    labels_N = (train.differences_NK[:, 0] > 0).astype(float)
    with pytest.raises(
        DataError, match=r"separated without error by 4 principles.*label more pairs"
    ):
        fit_regression(
            train.differences_NK,
            labels_N,
            train.prompt_ids,
            train.principles,
            num_bootstrap=5,
            seed=0,
        )


def test_labels_of_one_class_are_refused_with_advice(pairs):
    train = pairs(25, seed=7)
    with pytest.raises(DataError, match=r"all 25 human labels prefer response_a.*shuffle"):
        fit_regression(
            train.differences_NK,
            np.ones(25),
            train.prompt_ids,
            train.principles,
            num_bootstrap=5,
            seed=0,
        )


def test_fewer_than_twenty_labels_are_refused_with_advice(pairs):
    with pytest.raises(
        DataError, match=r"19 pairs of split 'weights'.*at least 20.*set reward.weights"
    ):
        fit(pairs(19, seed=7))


def test_a_principle_without_any_difference_is_named(pairs):
    train = pairs(40, seed=7)
    differences_NK = train.differences_NK.copy()
    differences_NK[:, 2] = 0.0
    with pytest.raises(
        DataError, match="'detail' gives both responses of every pair the same score"
    ):
        fit_regression(
            differences_NK,
            train.labels_N,
            train.prompt_ids,
            train.principles,
            num_bootstrap=5,
            seed=0,
        )


def test_a_principle_that_copies_another_is_fitted_all_the_same(pairs):
    train = pairs(200, seed=8)
    doubled_NK = train.differences_NK[:, [0, 1, 2, 3, 3]]
    found = fit_regression(
        doubled_NK,
        train.labels_N,
        train.prompt_ids,
        [*train.principles, "copy"],
        num_bootstrap=20,
        seed=0,
    )
    alone = fit(train)
    np.testing.assert_allclose(found.coefficient_K[3:].sum(), alone.coefficient_K[3], rtol=1e-3)


def test_credit_counts_the_chosen_response_and_ties_half():
    credit = pair_credit(
        np.array([1.0, 1.0, 2.0, 0.0]),
        np.array([0.0, 0.0, 2.0, 3.0]),
        np.array([1.0, 0.0, 1.0, 0.0]),
    )
    np.testing.assert_array_equal(credit, [1.0, 0.0, 0.5, 1.0])


def test_share_intervals_are_those_of_the_binomial():
    values_N1 = (np.arange(1000) < 700).astype(float)[:, None]
    share = bootstrap_shares(values_N1, [str(row) for row in range(1000)], seed=0).interval(0)
    half_width = 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert share.value == pytest.approx(0.7)
    assert share.low == pytest.approx(0.7 - half_width, abs=0.004)
    assert share.high == pytest.approx(0.7 + half_width, abs=0.004)
    assert share.num == 1000


def test_pairs_of_one_prompt_are_resampled_together():
    values_N1 = np.repeat((np.arange(100) < 50).astype(float), 10)[:, None]
    prompts = [str(row // 10) for row in range(1000)]
    share = bootstrap_shares(values_N1, prompts, seed=0).interval(0)
    assert share.num == 100
    assert share.high - share.low == pytest.approx(2 * 1.96 * 0.05, abs=0.025)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    base_N = (rng.random(500) < 0.6).astype(float)
    better_N = np.maximum(base_N, np.arange(500) < 25)  # never worse
    shares = bootstrap_shares(
        np.stack([better_N, base_N], axis=1), [str(row) for row in range(500)], seed=0
    )
    gap = shares.difference(0, 1)
    assert 0.0 <= gap.low < gap.value < gap.high < 0.06
