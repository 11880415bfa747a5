"""Normaliser and RewardFunction: hand-computed values, round trips, errors."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from morlaif_ray.config.learning import ALL_SCALARIZERS, RewardConfig
from morlaif_ray.errors import ArtifactError, DataError, ScalarizerError
from morlaif_ray.reward import Normaliser, RewardFunction, scalarize
from morlaif_ray.types import ScoreTable
from tests.unit.reward import vectors

RAW = vectors.SCORES
NAMES = ("helpfulness", "bias", "detail", "sycophancy")
WEIGHTS_JSON = {
    "principles": list(NAMES),
    "weights": {
        name: {"weight": weight, "low": None, "high": None}
        for name, weight in zip(NAMES, vectors.WEIGHTS, strict=True)
    },
    "normaliser": {
        "helpfulness": {"mean": 0.0, "std": 1.0, "num": 512},
        "bias": {"mean": 0.1, "std": 0.5, "num": 512},
        "detail": {"mean": 0.5, "std": 2.0, "num": 512},
        "sycophancy": {"mean": -0.2, "std": 0.25, "num": 512},
    },
}


def reward_function(scalarizer: str, **config: object) -> RewardFunction:
    return RewardFunction.from_artifacts(WEIGHTS_JSON, scalarizer, RewardConfig(**config))


def test_normaliser_has_the_population_mean_and_std_of_the_present_scores():
    fitted = Normaliser.fit([[1.0, 10.0], [3.0, np.nan], [5.0, 14.0]], ("a", "b"))
    np.testing.assert_allclose(fitted.mean_K, [3.0, 12.0])
    np.testing.assert_allclose(fitted.std_K, [np.sqrt(8.0 / 3.0), 2.0])
    assert fitted.num_K == (3, 2)
    np.testing.assert_allclose(fitted.apply([[3.0, 16.0]]), [[0.0, 2.0]])
    assert np.isnan(fitted.apply([[np.nan, 0.0]])[0, 0])


def test_normaliser_survives_json():
    fitted = Normaliser.fit(RAW, NAMES)
    back = Normaliser.from_json(json.loads(json.dumps(fitted.to_json())), NAMES)
    np.testing.assert_array_equal(back.mean_K, fitted.mean_K)
    np.testing.assert_array_equal(back.std_K, fitted.std_K)
    assert (back.principles, back.num_K) == (NAMES, (2, 2, 2, 2))


def test_normaliser_names_the_principle_that_it_cannot_be_fitted_to():
    with pytest.raises(DataError, match=r"normaliser of 'b': its scores .* are all the same"):
        Normaliser.fit([[1.0, 2.0], [2.0, 2.0]], ("a", "b"))
    with pytest.raises(DataError, match="normaliser of 'a': 1 reference scores, at least 2"):
        Normaliser.fit([[1.0]], ("a",))
    with pytest.raises(DataError, match="no mean and std for 'b'"):
        Normaliser.from_json({"a": {"mean": 0.0, "std": 1.0}}, ("a", "b"))
    with pytest.raises(DataError, match="2 columns of scores but 1 principles"):
        Normaliser.fit(RAW[:, :2], ("a",))
    with pytest.raises(ScalarizerError, match="4 columns but the normaliser has 2: a, b"):
        Normaliser.fit(RAW[:, :2], ("a", "b")).apply(RAW)


@pytest.mark.parametrize(("scalarizer", "expected"), vectors.NORMALISED)
def test_reward_function_normalises_then_scalarizes(scalarizer, expected):
    result = reward_function(scalarizer)(RAW)
    np.testing.assert_allclose(result.reward_B, expected, atol=6e-6)
    np.testing.assert_allclose(result.normalised_BK[0], [1.0, -1.2, 0.75, 2.0])
    assert (result.num_missing, result.num_scores) == (0, 8)


def test_config_parameters_reach_their_scalarizer():
    z = reward_function("linear")(RAW).normalised_BK
    weights = [0.5, 1.0, 0.25, -0.5]
    for name, setting, params in [
        ("soft_max_min", {"soft_max_min_temperature": 0.1}, {"temperature": 0.1}),
        ("uncertainty_weighted", {"uncertainty_lambda": 2.0}, {"lam": 2.0}),
        ("lower_quantile", {"lower_quantile": 0.5}, {"q": 0.5}),
        ("worst_case", {"weighting": "orient"}, {"weighting": "orient"}),
    ]:
        result = reward_function(name, **setting)(RAW)
        np.testing.assert_array_equal(result.reward_B, scalarize(name, z, weights, **params))


def test_missing_scores_are_an_error_by_name_or_counted():
    holey = RAW.copy()
    holey[1, 2] = np.nan
    with pytest.raises(ScalarizerError, match="row 1, column 'detail' is missing"):
        reward_function("linear")(holey)
    result = reward_function("worst_case", missing="renormalise")(holey)
    assert result.num_missing == 1
    np.testing.assert_allclose(result.reward_B, [-1.2, -0.6])


@pytest.mark.parametrize("scalarizer", ALL_SCALARIZERS)
def test_reward_function_survives_pickling(scalarizer):
    reward = reward_function(scalarizer)
    copy = pickle.loads(pickle.dumps(reward))
    np.testing.assert_array_equal(copy(RAW).reward_B, reward(RAW).reward_B)


def test_reward_function_reads_weights_json_from_disk(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(WEIGHTS_JSON), encoding="utf-8")
    reward = RewardFunction.from_artifacts(path, "linear", RewardConfig())
    np.testing.assert_allclose(reward(RAW).reward_B, [-1.5125, 1.4125])
    with pytest.raises(ArtifactError, match=r"weights\.json: damaged or of another version"):
        RewardFunction.from_artifacts({"principles": ["a"]}, "linear", RewardConfig())


def test_a_panel_with_other_columns_is_refused():
    reward = reward_function("linear")
    table = ScoreTable(scores_BK=RAW, principles=NAMES)
    np.testing.assert_array_equal(reward.of_table(table).reward_B, reward(RAW).reward_B)
    with pytest.raises(ScalarizerError, match="the panel's columns are bias, helpfulness"):
        reward.of_table(ScoreTable(scores_BK=RAW[:, :2], principles=("bias", "helpfulness")))


def test_a_baseline_is_the_same_class_with_one_linear_column():
    panel = {"baseline_normaliser": {"random_principle": {"mean": 1.0, "std": 2.0, "num": 512}}}
    reward = RewardFunction.for_baseline(panel, "random_principle")
    np.testing.assert_allclose(reward([[5.0], [-1.0]]).reward_B, [2.0, -1.0])
    assert reward.principles == ("random_principle",)
    with pytest.raises(ArtifactError, match="no baseline 'human_labels'; it has random_principle"):
        RewardFunction.for_baseline(panel, "human_labels")


def test_a_bad_reward_function_fails_when_it_is_made():
    normaliser = Normaliser.fit(RAW, NAMES)
    with pytest.raises(ScalarizerError, match="did you mean 'worst_case'"):
        RewardFunction(normaliser, np.ones(4), "worst_cas")
    with pytest.raises(ScalarizerError, match="unknown parameter 'lam'"):
        RewardFunction(normaliser, np.ones(4), "linear", params={"lam": 1.0})
    with pytest.raises(ScalarizerError, match=r"weights must have shape \[4\]"):
        RewardFunction(normaliser, np.ones(3), "linear")
