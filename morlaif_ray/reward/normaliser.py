"""Normalisation of raw preference-model scores: z = (s - mean)/std on reference (SFT) responses.

A reward is only defined up to scale and shift per preference model, so principles are compared in units of the spread
that the SFT policy itself shows. The normaliser is fitted once and stays fixed during RL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from morlaif_ray.errors import DataError, ScalarizerError
from morlaif_ray.reward.terms import check_scores
from morlaif_ray.types import FloatArray

SMALLEST_STD = (
    1e-12  # below this a model gives one constant: dividing by it would only amplify rounding
)


@dataclass(frozen=True, slots=True, eq=False)
class Normaliser:
    """Mean and standard deviation of K score columns. Produced by stage 3, consumed by `RewardFunction`."""

    principles: tuple[str, ...]
    """The K column names, in order."""
    mean_K: FloatArray
    """Raw score units."""
    std_K: FloatArray
    """Population standard deviation (divisor n), raw score units, above 0."""
    num_K: tuple[int, ...]
    """Reference responses behind each column."""

    def __post_init__(self) -> None:
        num_columns = len(self.principles)
        if self.mean_K.shape != (num_columns,) or self.std_K.shape != (num_columns,):
            raise DataError(
                f"normaliser: {num_columns} principles but mean {list(self.mean_K.shape)} and "
                f"std {list(self.std_K.shape)}"
            )
        for name, mean, std in zip(self.principles, self.mean_K, self.std_K, strict=True):
            if not np.isfinite(mean) or not np.isfinite(std):
                raise DataError(
                    f"normaliser of '{name}': mean {mean}, std {std}; both must be finite"
                )
            if std <= SMALLEST_STD:
                raise DataError(
                    f"normaliser of '{name}': its scores on the reference responses are all the same "
                    f"(std {std:.3g}); train this preference model again or leave the principle out"
                )

    @classmethod
    def fit(cls, scores_BK: npt.ArrayLike, principles: Sequence[str]) -> Normaliser:
        """Fits on raw reference scores [B, K]; missing ones (NaN) are left out, column by column.

        Raises DataError where a column has fewer than 2 scores, is constant or infinite.
        """
        scores = check_scores(scores_BK)
        if scores.shape[1] != len(principles):
            raise DataError(f"{scores.shape[1]} columns of scores but {len(principles)} principles")
        num_K = (~np.isnan(scores)).sum(axis=0)
        for name, num in zip(principles, num_K, strict=True):
            if num < 2:
                raise DataError(
                    f"normaliser of '{name}': {num} reference scores, at least 2 are needed "
                    f"(500 or more for a real run: preference.num_normaliser_samples)"
                )
        return cls(
            principles=tuple(principles),
            mean_K=np.nanmean(scores, axis=0),
            std_K=np.nanstd(scores, axis=0),
            num_K=tuple(int(num) for num in num_K),
        )

    def apply(self, scores_BK: npt.ArrayLike) -> FloatArray:
        """z_BK of raw scores [B, K]; NaN stays NaN."""
        scores = check_scores(scores_BK)
        if scores.shape[1] != len(self.principles):
            raise ScalarizerError(
                f"scores have {scores.shape[1]} columns but the normaliser has {len(self.principles)}: "
                f"{', '.join(self.principles)}"
            )
        return np.asarray((scores - self.mean_K) / self.std_K)

    def to_json(self) -> dict[str, dict[str, float | int]]:
        """`{name: {mean, std, num}}`, as in `panel.json` and `weights.json`."""
        columns = zip(self.principles, self.mean_K, self.std_K, self.num_K, strict=True)
        return {
            name: {"mean": float(m), "std": float(s), "num": num} for name, m, s, num in columns
        }

    @classmethod
    def from_json(
        cls, values: Mapping[str, Mapping[str, Any]], principles: Sequence[str]
    ) -> Normaliser:
        """Reads `to_json` values; `principles` gives the column order. DataError where one is missing or damaged."""
        for name in principles:
            entry = values.get(name)
            if entry is None or entry.get("mean") is None or entry.get("std") is None:
                raise DataError(
                    f"normaliser: no mean and std for '{name}'; run train_preference_models again"
                )
        return cls(
            principles=tuple(principles),
            mean_K=np.array([values[name]["mean"] for name in principles], dtype=np.float64),
            std_K=np.array([values[name]["std"] for name in principles], dtype=np.float64),
            num_K=tuple(int(values[name].get("num") or 0) for name in principles),
        )
