"""Scalarizers against the hand-computed vectors of ALGORITHMS.md section 4, and their properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from morlaif_ray.config.learning import ALL_SCALARIZERS
from morlaif_ray.errors import ScalarizerError
from morlaif_ray.reward import SCALARIZERS, count_missing, scalarize
from tests.unit.reward import vectors

Z, W = vectors.SCORES, vectors.WEIGHTS
MU = np.array([0.0, 0.1, 0.5, -0.2])
SIGMA = np.array([1.0, 0.5, 2.0, 0.25])

VECTORS = [
    ("linear", {}, [0.35, 0.45]),
    ("worst_case", {}, [-0.5, -0.6]),
    ("soft_max_min", {"temperature": 1.0}, [-0.005887, 0.010132]),
    ("soft_max_min", {"form": "softmin_mean"}, [-0.097451, -0.099193]),
    ("uncertainty_weighted", {"lam": 0.5}, [-0.005234, 0.019766]),
    ("lower_quantile", {"q": 1 / 3}, [-0.5, -0.6]),
    ("lower_quantile", {"q": 0.5}, [-0.325, -0.225]),
    ("max_median", {}, [0.175, 0.275]),
    ("bernoulli_nash", {}, [0.493370, 0.513271]),
    ("bernoulli_nash", {"log": True}, [-0.706497, -0.666951]),
    ("bernoulli_nash", {"weighting": "orient"}, [0.567136, 0.503341]),
]
FORMS = [
    *((name, {}) for name in ALL_SCALARIZERS),
    ("soft_max_min", {"form": "softmin_mean"}),
    ("bernoulli_nash", {"log": True}),
]
MONOTONE = [*(name for name in ALL_SCALARIZERS if SCALARIZERS[name].monotone)]

scores = st.floats(-5.0, 5.0, width=32).map(float)
weights = st.floats(0.125, 3.0, width=32).map(float)
signs = st.sampled_from([-1.0, 1.0])


@st.composite
def weighted_batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    num_rows, num_columns = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    z = draw(arrays(np.float64, (num_rows, num_columns), elements=scores))
    size = draw(arrays(np.float64, num_columns, elements=weights))
    return z, size * draw(arrays(np.float64, num_columns, elements=signs))


@pytest.mark.parametrize(("name", "params", "expected"), VECTORS)
def test_scalarizer_gives_the_documented_vector(name, params, expected):
    np.testing.assert_allclose(scalarize(name, Z, W, **params), expected, atol=6e-7)


@pytest.mark.parametrize(("name", "expected"), vectors.NORMALISED)
def test_scalarizer_gives_the_documented_vector_after_normalisation(name, expected):
    np.testing.assert_allclose(scalarize(name, (Z - MU) / SIGMA, W), expected, atol=6e-6)


def test_nash_with_equal_absolute_weights_gives_the_documented_vector():
    np.testing.assert_allclose(
        scalarize("bernoulli_nash", Z, np.sign(W)), [0.567136, 0.503341], atol=6e-7
    )


def test_soft_max_min_stays_exact_far_from_zero():
    np.testing.assert_allclose(
        scalarize("soft_max_min", [[-1000.0, 0.0, 5.0]]), [-998.901388], atol=6e-7
    )


def test_the_dict_lists_the_config_names_in_order_and_its_entries_can_be_called():
    assert tuple(SCALARIZERS) == ALL_SCALARIZERS
    assert isinstance(SCALARIZERS, dict)
    np.testing.assert_array_equal(SCALARIZERS["linear"](Z, W), scalarize("linear", Z, W))


@pytest.mark.parametrize(("name", "params"), FORMS)
@settings(max_examples=40, deadline=None)
@given(batch=weighted_batches())
def test_a_reward_does_not_depend_on_the_other_rows(name, params, batch):
    z, w = batch
    together = scalarize(name, z, w, **params)
    alone = np.concatenate([scalarize(name, row[None, :], w, **params) for row in z])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, scalarize(name, np.asfortranarray(z), w, **params))


@pytest.mark.parametrize(("name", "params"), FORMS)
@settings(max_examples=40, deadline=None)
@given(batch=weighted_batches(), seed=st.integers(0, 1000))
def test_the_order_of_principles_does_not_matter(name, params, batch, seed):
    z, w = batch
    order = np.random.default_rng(seed).permutation(len(w))
    np.testing.assert_allclose(
        scalarize(name, z, w, **params), scalarize(name, z[:, order], w[order], **params), atol=1e-9
    )


@pytest.mark.parametrize("name", MONOTONE)
@settings(max_examples=60, deadline=None)
@given(batch=weighted_batches(), column=st.integers(0, 7), gain=st.floats(0.0, 10.0))
def test_raising_one_oriented_score_never_lowers_the_reward(name, batch, column, gain):
    z, w = batch
    better = z.copy()
    better[:, column % len(w)] += gain * np.sign(w[column % len(w)])
    assert (scalarize(name, better, w) >= scalarize(name, z, w) - 1e-9).all()


def test_the_softmin_mean_form_and_the_variance_penalty_are_not_monotone():
    softmin = scalarize("soft_max_min", [[0.0, 1.0], [0.0, 6.0]], form="softmin_mean")
    np.testing.assert_allclose(softmin, [0.2689, 0.0148], atol=5e-5)
    spread = scalarize("uncertainty_weighted", [[0.0, 1.0], [0.0, 6.0]], lam=0.5)
    np.testing.assert_allclose(spread, [0.375, -1.5])
    assert not SCALARIZERS["uncertainty_weighted"].monotone


@pytest.mark.parametrize("name", ALL_SCALARIZERS)
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_one_principle_alone_is_its_own_summary(name, size):
    z = np.array([[-2.0], [0.0], [1.5]]) * size
    expected = z[:, 0] * -0.5
    if name == "bernoulli_nash":
        with np.errstate(over="ignore"):
            expected = 1.0 / (1.0 + np.exp(z[:, 0]))
    np.testing.assert_allclose(scalarize(name, z, [-0.5]), expected, atol=1e-12)


@pytest.mark.parametrize(("name", "params"), FORMS)
def test_scores_of_a_thousand_are_stable(name, params):
    z = np.array([[1e3, -1e3, 0.0], [1e3, 1e3, 1e3], [-1e3, -1e3, -1e3]])
    reward = scalarize(name, z, [1.0, -0.5, 2.0], **params)
    assert np.isfinite(reward).all()
    assert reward.dtype == np.float64


@settings(max_examples=60, deadline=None)
@given(batch=weighted_batches())
def test_soft_max_min_runs_from_the_minimum_to_the_mean(batch):
    z, w = batch
    v = z * w
    for tiny in (1e-4, 1e-300):
        np.testing.assert_allclose(
            scalarize("soft_max_min", z, w, temperature=tiny), v.min(axis=1), atol=1e-3
        )
    np.testing.assert_allclose(
        scalarize("soft_max_min", z, w, temperature=1e9), v.mean(axis=1), atol=1e-6
    )


def test_a_principle_of_weight_zero_is_dropped_before_anything_else():
    z = np.array([[2.0, 1.0, 5.0, np.nan], [2.0, 4.0, -9.0, np.inf]])
    for name in ALL_SCALARIZERS:
        np.testing.assert_array_equal(
            scalarize(name, z, [1.0, 2.0, 0.0, 0.0]), scalarize(name, z[:, :2], [1.0, 2.0])
        )
    np.testing.assert_array_equal(scalarize("worst_case", z, [1.0, 2.0, 0.0, 0.0]), [2.0, 2.0])


def test_weights_none_are_ones_and_orient_keeps_their_direction_only():
    np.testing.assert_array_equal(scalarize("linear", Z), Z.sum(axis=1))
    for name in ALL_SCALARIZERS:
        np.testing.assert_allclose(
            scalarize(name, Z, W, weighting="orient"), scalarize(name, Z, np.sign(W)), atol=1e-12
        )


@pytest.mark.parametrize(("name", "params"), [*FORMS, ("lower_quantile", {"q": 0.5})])
@settings(max_examples=40, deadline=None)
@given(batch=weighted_batches(), seed=st.integers(0, 1000))
def test_renormalised_rows_equal_their_present_columns_alone(name, params, batch, seed):
    z, w = batch
    gone = np.random.default_rng(seed).random(z.shape) < 0.4
    gone[np.arange(len(z)), seed % len(w)] = False
    holey = np.where(gone, np.nan, z)
    expected = [
        scalarize(name, row[None, ~out], w[~out], **params)[0]
        for row, out in zip(z, gone, strict=True)
    ]
    np.testing.assert_allclose(
        scalarize(name, holey, w, missing="renormalise", **params), expected, atol=1e-9
    )
    assert count_missing(holey, w) == gone.sum()


def test_missing_scores_are_counted_only_where_they_are_needed():
    assert count_missing([[np.nan, 1.0, np.nan]], [1.0, 1.0, 0.0]) == 1


def test_an_empty_batch_has_an_empty_reward():
    for name in ALL_SCALARIZERS:
        assert scalarize(name, np.zeros((0, 3))).shape == (0,)


def test_inputs_are_left_as_they_were():
    z, w = Z.copy(), W.copy()
    for name in ALL_SCALARIZERS:
        scalarize(name, z, w)
    np.testing.assert_array_equal(z, Z)
    np.testing.assert_array_equal(w, W)


BAD = [
    ("linaer", Z, W, {}, "unknown scalarizer 'linaer'; did you mean 'linear'?"),
    ("zzz", Z, W, {}, "unknown scalarizer 'zzz'; known: linear, worst_case"),
    ("linear", [[1.0, np.nan]], None, {}, "row 0, column 1 is missing (NaN)"),
    ("linear", [[np.nan, np.nan]], None, {"missing": "renormalise"}, "row 0 has no score at all"),
    ("linear", [[1.0, 2.0], [np.inf, 0.0]], None, {}, "row 1, column 0 is inf"),
    ("linear", [1.0, 2.0], None, {}, "must have shape [B, K], got [2]"),
    ("linear", np.zeros((2, 0)), None, {}, "no columns"),
    ("linear", [[1.0], [1.0, 2.0]], None, {}, "rectangular array"),
    ("linear", [["a"]], None, {}, "rectangular array of numbers"),
    ("linear", Z, [1.0, 2.0], {}, "weights must have shape [4], one per column of scores, got [2]"),
    ("linear", Z, np.zeros(4), {}, "all weights are 0"),
    ("linear", Z, [1.0, np.nan, 1.0, 1.0], {}, "weight 1 is nan"),
    ("linear", Z, ["a"] * 4, {}, "weights must be a list of numbers"),
    (
        "linear",
        Z,
        W,
        {"temperature": 1.0},
        "linear: unknown parameter 'temperature'; known: weighting, missing",
    ),
    (
        "soft_max_min",
        Z,
        W,
        {"temprature": 1.0},
        "unknown parameter 'temprature'; did you mean 'temperature'?",
    ),
    ("soft_max_min", Z, W, {"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
    ("soft_max_min", Z, W, {"temperature": float("inf")}, "temperature is inf; it must be finite"),
    ("soft_max_min", Z, W, {"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
    (
        "soft_max_min",
        Z,
        W,
        {"form": "softmin"},
        "unknown form 'softmin'; did you mean 'softmin_mean'?",
    ),
    ("uncertainty_weighted", Z, W, {"lam": -1.0}, "lam is -1.0; it must be 0 or more"),
    ("lower_quantile", Z, W, {"q": 0.0}, "q is 0.0; it must lie in (0, 1]"),
    ("lower_quantile", Z, W, {"q": 1.1}, "q is 1.1; it must lie in (0, 1]"),
    ("bernoulli_nash", Z, W, {"log": "yes"}, "log is 'yes'; it must be true or false"),
    (
        "linear",
        Z,
        W,
        {"weighting": "orientt"},
        "unknown weighting 'orientt'; did you mean 'orient'?",
    ),
    ("linear", Z, W, {"missing": "ignore"}, "unknown missing 'ignore'; known: error, renormalise"),
]


@pytest.mark.parametrize(("name", "z", "w", "params", "message"), BAD)
def test_bad_input_is_named(name, z, w, params, message):
    with pytest.raises(ScalarizerError) as caught:
        scalarize(name, z, w, **params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
