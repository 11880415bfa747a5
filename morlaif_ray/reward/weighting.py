"""Where the weights come from: fitted on human labels, written in the config, or - without labels - all ones.

Legend: N pairs, K principles. All weights act on z = (s - mu)/sigma (see `regression` for the change of scale).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from morlaif_ray.config.learning import RewardConfig
from morlaif_ray.errors import ConfigError, DataError
from morlaif_ray.reward.normaliser import Normaliser
from morlaif_ray.reward.pairs import PairScores
from morlaif_ray.reward.regression import MIN_LABELLED_PAIRS, Regression, fit_regression
from morlaif_ray.reward.terms import unknown
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class ChosenWeights:
    """The weights that the run uses."""

    source: Literal["fitted", "config", "ones"]
    weight_K: FloatArray
    """Signed, on z."""
    low_K: FloatArray
    """2.5% bootstrap percentile on z; NaN where the weights were not fitted."""
    high_K: FloatArray
    regression: Regression | None
    """The fit on human labels, also where the config's weights are used; None without enough labels."""
    notes: tuple[str, ...]
    """Lines for the person who runs this."""


def choose_weights(
    train: PairScores, num_labelled: int, normaliser: Normaliser, config: RewardConfig, seed: int
) -> ChosenWeights:
    """Decides the weights by section `reward`.

    Args:
        train: complete pairs of split `weights`.
        num_labelled: pairs of that split with a human label, complete or not; 0: nobody was asked.

    Raises:
        ConfigError: reward.weights names an unknown principle, or leaves none.
        DataError: labels exist, but too few, of one class, or perfectly separable (weights "fitted" only).
    """
    if config.weights != "fitted":
        weight_K = configured_weights(config.weights, normaliser.principles)
        try:
            regression = _regression_if_possible(train, config, seed)
        except DataError as error:
            note = f"no fit beside the configured weights, so no ablation: {error.message}"
            return _unfitted("config", weight_K, None, (note,))
        return _unfitted("config", weight_K, regression, ())
    if num_labelled == 0:
        note = (
            "no pair of split 'weights' has a human label: all principles get weight 1 "
            "(set reward.weights to choose others)"
        )
        return _unfitted("ones", np.ones(len(normaliser.principles)), None, (note,))
    regression = fit_regression(
        train.differences_NK,
        train.labels_N,
        train.prompt_ids,
        train.principles,
        num_bootstrap=config.num_bootstrap,
        seed=derive_seed(seed, "weights"),
        ridge=config.ridge,
        nonnegative=config.nonnegative,
    )
    factor_K = regression.weight_factor_K(normaliser.std_K)
    return ChosenWeights(
        source="fitted",
        weight_K=regression.coefficient_K * factor_K,
        low_K=regression.low_K * factor_K,
        high_K=regression.high_K * factor_K,
        regression=regression,
        notes=(),
    )


def configured_weights(weights: Mapping[str, float], principles: Sequence[str]) -> FloatArray:
    """`reward.weights` as an array in panel order; principles that it does not name get 0 (dropped).

    ConfigError for an unknown principle (with the nearest name), a weight that is not finite, or no weight but 0.
    """
    for name, value in weights.items():
        if name not in principles:
            raise ConfigError("reward.weights: " + unknown("principle", name, principles))
        if not np.isfinite(value):
            raise ConfigError(f"reward.weights.{name} is {value}; it must be a finite number")
    weight_K = np.array([float(weights.get(name, 0.0)) for name in principles])
    if not weight_K.any():
        raise ConfigError(
            "reward.weights gives every principle 0; give at least one another weight"
        )
    return weight_K


def can_fit(labels_N: FloatArray) -> bool:
    """Whether a regression on these labels is possible at all: enough pairs, both classes."""
    return len(labels_N) >= MIN_LABELLED_PAIRS and labels_N.min() != labels_N.max()


def _regression_if_possible(
    train: PairScores, config: RewardConfig, seed: int
) -> Regression | None:
    """The fit behind the ablation where the weights come from the config; None without enough labels.

    DataError where there are enough, but no fit (`reward.nonnegative` against people): nothing else hangs on it.
    """
    if not can_fit(train.labels_N):
        return None
    return fit_regression(
        train.differences_NK,
        train.labels_N,
        train.prompt_ids,
        train.principles,
        num_bootstrap=config.num_bootstrap,
        seed=derive_seed(seed, "weights"),
        allow_separable=True,
        ridge=config.ridge,
        nonnegative=config.nonnegative,
    )


def _unfitted(
    source: Literal["config", "ones"],
    weight_K: FloatArray,
    regression: Regression | None,
    notes: tuple[str, ...],
) -> ChosenWeights:
    unknown_K = np.full(len(weight_K), np.nan)
    return ChosenWeights(source, weight_K, unknown_K, unknown_K, regression, notes)
