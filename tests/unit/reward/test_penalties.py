"""`reward.ridge` and `reward.nonnegative`: pulled towards 0, and never below it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from morlaif_ray.errors import DataError
from morlaif_ray.reward.regression import RIDGE, fit_regression, refit


def fit(pairs, **options):
    return fit_regression(
        pairs.differences_NK,
        pairs.labels_N,
        pairs.prompt_ids,
        pairs.principles,
        num_bootstrap=40,
        seed=1,
        **options,
    )


def test_a_ridge_is_scikit_learns_penalty(pairs):
    train = pairs(300, seed=5)
    found = fit(train, ridge=25.0)
    model = LogisticRegression(C=1 / 25.0, fit_intercept=False, tol=1e-10)
    model.fit(train.differences_NK / found.diff_scale_K, train.labels_N)
    np.testing.assert_allclose(found.coefficient_K, model.coef_[0], atol=1e-5)
    assert np.abs(found.coefficient_K).sum() < 0.9 * np.abs(fit(train).coefficient_K).sum()
    assert (found.low_K <= found.coefficient_K).all()
    assert (found.coefficient_K <= found.high_K).all()


def test_the_default_ridge_is_the_fit_without_the_option(pairs):
    train = pairs(300, seed=5)
    np.testing.assert_array_equal(fit(train, ridge=RIDGE).coefficient_K, fit(train).coefficient_K)


def test_non_negative_weights_are_the_best_ones_that_are_not_negative(pairs):
    train = pairs(800, seed=6)
    free, found = fit(train), fit(train, nonnegative=True)
    assert free.high_K[3] < 0.0  # people choose against the last principle
    assert found.coefficient_K[3] == found.low_K[3] == found.high_K[3] == 0.0
    assert (found.coefficient_K >= 0.0).all()
    assert (found.low_K >= 0.0).all()
    # Dropping that column by hand gives the same fit of the others.
    signed = train.differences_NK / found.diff_scale_K * (2.0 * train.labels_N - 1.0)[:, None]
    without = refit(signed, active_RK=np.array([[True, True, True, False]]))[0]
    np.testing.assert_allclose(found.coefficient_K, without, atol=1e-4)


def test_non_negative_refits_agree_with_a_general_optimiser(pairs):
    train = pairs(120, seed=8)
    signed = train.differences_NK * (2.0 * train.labels_N - 1.0)[:, None]
    signed = signed / np.sqrt(np.square(signed).mean(axis=0))
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 3, (3, 120)).astype(float)
    found = refit(signed, counts, ridge=0.5, nonnegative=True)

    def loss(beta, count):
        return float((count * np.logaddexp(0.0, -signed @ beta)).sum() + 0.25 * beta @ beta)

    for beta, count in zip(found, counts, strict=True):
        best = minimize(
            loss,
            np.full(4, 0.1),
            args=(count,),
            bounds=[(0.0, None)] * 4,
            method="Powell",
            options={"xtol": 1e-8, "ftol": 1e-12},
        )
        assert loss(beta, count) <= best.fun + 1e-6


def test_a_ridge_makes_separable_labels_fit(pairs):
    train = pairs(30, seed=2)
    train.labels_N[:] = (train.differences_NK[:, 0] > 0).astype(float)
    with pytest.raises(DataError, match=r"separated without error.*raise reward\.ridge, or set"):
        fit(train)
    found = fit(train, ridge=1.0)
    assert np.isfinite(found.coefficient_K).all()
    assert found.coefficient_K[0] > 0.0


def test_no_weight_left_is_an_error(pairs):
    train = pairs(200, seed=4)
    best = train.differences_NK[:, :1]
    with pytest.raises(DataError, match=r"reward\.nonnegative leaves no principle a weight"):
        fit_regression(
            -best,
            (best[:, 0] + np.random.default_rng(0).normal(0, best.std(), 200) > 0).astype(float),
            train.prompt_ids,
            train.principles[:1],
            num_bootstrap=4,
            seed=0,
            nonnegative=True,
        )
