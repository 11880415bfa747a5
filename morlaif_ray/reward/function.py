"""The reward as one object: normaliser, weights, scalarizer and its parameters.

    reward = RewardFunction.from_artifacts(run / "4_reward/weights.json", "soft_max_min", config.reward)
    result = reward(raw_scores_BK)      # result.reward_B, result.normalised_BK, result.num_missing

A single-objective baseline is the same class with K = 1 and `linear` (`RewardFunction.for_baseline`), so PPO does not
know the difference. It holds arrays and strings only and travels to Ray actors by pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from morlaif_ray.artifacts import read_json
from morlaif_ray.config.learning import RewardConfig
from morlaif_ray.errors import ArtifactError, ScalarizerError
from morlaif_ray.reward.normaliser import Normaliser
from morlaif_ray.reward.scalarizers import find_scalarizer
from morlaif_ray.reward.terms import Missing, Weighting, check_weights, count_missing
from morlaif_ray.types import FloatArray, ScoreTable


@dataclass(frozen=True, slots=True, eq=False)
class RewardResult:
    """Rewards of a batch with the vector they came from. Consumed by `train_policy` and `evaluation`."""

    reward_B: FloatArray
    """Scalar reward per response, in units of the scalarizer."""
    normalised_BK: FloatArray
    """z per principle, all K columns, NaN where missing."""
    num_missing: int
    """Missing scores among the principles that carry weight; to be summed up and held against a limit."""
    num_scores: int
    """Scores that were needed: B times the number of principles that carry weight."""


@dataclass(frozen=True, slots=True, eq=False)
class RewardFunction:
    """Raw scores of K principles to one reward. Checked when made, so a bad parameter fails before RL starts."""

    normaliser: Normaliser
    weights_K: FloatArray
    """Signed weights on z, in the normaliser's column order."""
    scalarizer: str
    params: Mapping[str, Any] = field(default_factory=dict)
    """The scalarizer's own parameters."""
    weighting: Weighting = "multiply"
    missing: Missing = "error"

    def __post_init__(self) -> None:
        find_scalarizer(self.scalarizer).check_parameters(self.params)
        check_weights(self.weights_K, len(self.principles))

    @property
    def principles(self) -> tuple[str, ...]:
        """Names of the K columns, in order."""
        return self.normaliser.principles

    def __call__(self, raw_scores_BK: npt.ArrayLike) -> RewardResult:
        """Normalises and scalarizes raw scores [B, K].

        Raises ScalarizerError as `scalarize` does, with the principle's name for a bad score.
        """
        normalised_BK = self.normaliser.apply(raw_scores_BK)
        reward_B = find_scalarizer(self.scalarizer)(
            normalised_BK,
            self.weights_K,
            weighting=self.weighting,
            missing=self.missing,
            columns=self.principles,
            **self.params,
        )
        return RewardResult(
            reward_B=reward_B,
            normalised_BK=normalised_BK,
            num_missing=count_missing(normalised_BK, self.weights_K),
            num_scores=len(reward_B) * int(np.count_nonzero(self.weights_K)),
        )

    def of_table(self, table: ScoreTable) -> RewardResult:
        """The same for a panel's `ScoreTable`; ScalarizerError where its columns are others or in another order."""
        if table.principles != self.principles:
            raise ScalarizerError(
                f"the panel's columns are {', '.join(table.principles)} but the reward function needs "
                f"{', '.join(self.principles)}"
            )
        return self(table.scores_BK)

    @classmethod
    def from_artifacts(
        cls, weights_json: Path | Mapping[str, Any], scalarizer: str, config: RewardConfig
    ) -> RewardFunction:
        """From `4_reward/weights.json` (its path or content) and config section `reward`."""
        values = read_json(weights_json) if isinstance(weights_json, Path) else weights_json
        try:
            principles = tuple(values["principles"])
            weights_K = np.array(
                [values["weights"][name]["weight"] for name in principles], dtype=np.float64
            )
            normaliser = Normaliser.from_json(values["normaliser"], principles)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"weights.json: damaged or of another version ({error!r})"
            ) from None
        return cls(
            normaliser=normaliser,
            weights_K=weights_K,
            scalarizer=scalarizer,
            params=configured_parameters(scalarizer, config),
            weighting=config.weighting,
            missing=config.missing,
        )

    @classmethod
    def for_baseline(cls, panel_json: Path | Mapping[str, Any], baseline: str) -> RewardFunction:
        """A single-objective baseline's reward from `3_preference_models/panel.json`: K = 1, weight 1, linear.

        A baseline with one score has nothing to fall back on, so a missing one is an error.
        """
        values = read_json(panel_json) if isinstance(panel_json, Path) else panel_json
        known = values.get("baseline_normaliser", {})
        if baseline not in known:
            raise ArtifactError(
                f"panel.json: no baseline '{baseline}'; it has {', '.join(sorted(known)) or 'none'} "
                f"(preference.baselines)"
            )
        return cls(
            normaliser=Normaliser.from_json(known, (baseline,)),
            weights_K=np.ones(1),
            scalarizer="linear",
        )


def configured_parameters(scalarizer: str, config: RewardConfig) -> dict[str, float]:
    """The scalarizer's own parameters as section `reward` sets them."""
    settings: dict[str, dict[str, float]] = {
        "soft_max_min": {"temperature": config.soft_max_min_temperature},
        "uncertainty_weighted": {"lam": config.uncertainty_lambda},
        "lower_quantile": {"q": config.lower_quantile},
    }
    return settings.get(find_scalarizer(scalarizer).name, {})
