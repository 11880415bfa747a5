"""What a scalarizer sees: checked, oriented and weighted scores, with the missing ones marked.

Legend: B batch, K principles (after principles of weight 0 are dropped).
z scores in, v = w*z and u = sign(w)*z out, so that larger is better in every column whatever the sign of its weight.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from morlaif_ray.errors import ScalarizerError
from morlaif_ray.types import BoolArray, FloatArray, IntArray

Weighting = Literal["multiply", "orient"]
Missing = Literal["error", "renormalise"]


@dataclass(frozen=True, slots=True)
class Terms:
    """One batch, ready to be scalarized row by row. Missing entries hold 0 in every array: use `present_BK`."""

    weighted_BK: FloatArray
    """v: w*z, or sign(w)*z under `weighting="orient"`."""
    oriented_BK: FloatArray
    """u: sign(w)*z."""
    importance_K: FloatArray
    """|w|, or ones under `weighting="orient"`; positive."""
    present_BK: BoolArray
    """False where the score is missing. Every row has at least one True."""
    count_B: IntArray
    """Number of present scores per row, 1..K."""


def make_terms(
    scores_BK: npt.ArrayLike,
    weights_K: npt.ArrayLike | None,
    weighting: Weighting = "multiply",
    missing: Missing = "error",
    columns: Sequence[str] | None = None,
) -> Terms:
    """Checks scores and weights and prepares them.

    Args:
        scores_BK: normalised scores [B, K]; B may be 0, K may not.
        weights_K: signed weights [K]; None: ones. A column of weight 0 is dropped, whatever it holds.
        weighting: "multiply": v = w*z; "orient": v = sign(w)*z, the weights only give the direction.
        missing: what a NaN does: "error", or "renormalise": the row is scalarized over its present scores.
        columns: names of the K columns for error messages; None: their numbers.

    Raises:
        ScalarizerError: wrong shape, infinity, NaN (unless renormalised), a row without any score, bad weights.
    """
    if weighting not in get_args(Weighting):
        raise ScalarizerError(unknown("weighting", weighting, get_args(Weighting)))
    if missing not in get_args(Missing):
        raise ScalarizerError(unknown("missing", missing, get_args(Missing)))
    scores = check_scores(scores_BK)
    weights = check_weights(weights_K, scores.shape[1])
    kept_K = weights != 0.0
    names = [name for name, keep in zip(_names(columns, len(kept_K)), kept_K, strict=True) if keep]
    # Row-major whatever came in: NumPy then adds each row in the same order for every batch size.
    z_BK = np.ascontiguousarray(scores[:, kept_K])
    present_BK = ~np.isnan(z_BK)
    _check_entries(z_BK, present_BK, missing, names)
    z_BK = np.where(present_BK, z_BK, 0.0)
    w_K = weights[kept_K]
    oriented_BK = z_BK * np.sign(w_K)
    orient = weighting == "orient"
    return Terms(
        weighted_BK=oriented_BK if orient else z_BK * w_K,
        oriented_BK=oriented_BK,
        importance_K=np.ones_like(w_K) if orient else np.abs(w_K),
        present_BK=present_BK,
        count_B=present_BK.sum(axis=1, dtype=np.int64),
    )


def count_missing(scores_BK: npt.ArrayLike, weights_K: npt.ArrayLike | None = None) -> int:
    """Number of NaN scores in the columns that carry weight (the ones that a scalarizer needs)."""
    scores = check_scores(scores_BK)
    weights = check_weights(weights_K, scores.shape[1])
    return int(np.isnan(scores[:, weights != 0.0]).sum())


def check_scores(scores_BK: npt.ArrayLike) -> FloatArray:
    """The scores as float64 [B, K] with K >= 1, or ScalarizerError."""
    try:
        scores = np.asarray(scores_BK, dtype=np.float64)
    except (TypeError, ValueError):
        raise ScalarizerError("scores must be a rectangular array of numbers [B, K]") from None
    if scores.ndim != 2:
        raise ScalarizerError(
            f"scores must have shape [B, K], got {list(scores.shape)}; "
            f"write scores[None, :] for the K scores of one response"
        )
    if scores.shape[1] == 0:
        raise ScalarizerError("scores have no columns; at least one principle is needed")
    return scores


def check_weights(weights_K: npt.ArrayLike | None, num_columns: int) -> FloatArray:
    """The weights as float64 [K] (None: ones), or ScalarizerError."""
    if weights_K is None:
        return np.ones(num_columns)
    try:
        weights = np.asarray(weights_K, dtype=np.float64)
    except (TypeError, ValueError):
        raise ScalarizerError("weights must be a list of numbers, one per principle") from None
    if weights.shape != (num_columns,):
        raise ScalarizerError(
            f"weights must have shape [{num_columns}], one per column of scores, got {list(weights.shape)}"
        )
    if not np.isfinite(weights).all():
        at = int(np.flatnonzero(~np.isfinite(weights))[0])
        raise ScalarizerError(f"weight {at} is {weights[at]}; weights must be finite numbers")
    if not weights.any():
        raise ScalarizerError(
            "all weights are 0, so no principle is left; give at least one a weight"
        )
    return weights


def unknown(what: str, value: object, known: Iterable[str]) -> str:
    """One line that names the nearest valid value, or all of them."""
    choices = list(known)
    close = difflib.get_close_matches(str(value), choices, n=1)
    listed = ", ".join(choices) if choices else "none"
    return f"unknown {what} '{value}'; " + (
        f"did you mean '{close[0]}'?" if close else f"known: {listed}"
    )


def _names(columns: Sequence[str] | None, num_columns: int) -> list[str]:
    if columns is None:
        return [f"column {index}" for index in range(num_columns)]
    return [f"column '{name}'" for name in columns]


def _check_entries(
    z_BK: FloatArray, present_BK: BoolArray, missing: Missing, names: list[str]
) -> None:
    infinite_BK = np.isinf(z_BK)
    if infinite_BK.any():
        row, column = np.argwhere(infinite_BK)[0]
        raise ScalarizerError(
            f"score in row {row}, {names[column]} is {z_BK[row, column]}; "
            f"scores must be finite (NaN marks a missing one)"
        )
    if missing == "error" and not present_BK.all():
        row, column = np.argwhere(~present_BK)[0]
        raise ScalarizerError(
            f"score in row {row}, {names[column]} is missing (NaN); score it again, or write "
            f"missing: renormalise to scalarize over the present principles"
        )
    empty_B = ~present_BK.any(axis=1)
    if empty_B.any():
        raise ScalarizerError(
            f"row {int(np.flatnonzero(empty_B)[0])} has no score at all; drop it or score it again"
        )
