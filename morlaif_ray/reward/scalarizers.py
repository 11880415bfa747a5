"""Scalarizers: from the K scores of a response to one reward (Williams 2024, arXiv 2406.07295, section 3).

    reward_B = scalarize("soft_max_min", z_BK, weights_K, temperature=0.5)

Contract: NumPy in, NumPy out, float64, no state. Every row is scalarized by itself: a reward does not depend on which
other responses stand in the batch. Input is normalised, z = (s - mu)/sigma: raw preference-model scores have no common
scale or zero, and every scalarizer but `linear` compares principles with each other. Weights are signed: a negative one
means "less is better" and flips its column, so that every scalarizer sees larger-is-better values; a principle of
weight 0 is dropped, since its constant 0 would otherwise sit in every minimum, median and product.

Legend: B batch, K principles of non-zero weight; v = w*z, u = sign(w)*z, a = |w|/sum|w|. Under `weighting="orient"`
v = u and a = 1/K: weights only give the direction. Under `missing="renormalise"` the result of a row is exactly what
its present columns alone would give; for `linear`, a plain sum, that leaves the missing term out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from morlaif_ray.errors import ScalarizerError
from morlaif_ray.reward.terms import Missing, Terms, Weighting, make_terms, unknown
from morlaif_ray.types import FloatArray

FLOOR_GUARD = 1e-9  # q*K such as (1/3)*3 may come out just under the integer that it is
SOFT_FORMS = ("log_mean_exp", "softmin_mean")


def linear(terms: Terms) -> FloatArray:
    """sum_k v_k. Monotone. With fitted weights: the logistic regression's utility."""
    return np.asarray(terms.weighted_BK.sum(axis=1))


def worst_case(terms: Terms) -> FloatArray:
    """min_k v_k. Monotone (not strictly: only the worst principle counts)."""
    return np.asarray(np.where(terms.present_BK, terms.weighted_BK, np.inf).min(axis=1))


def soft_max_min(
    terms: Terms, *, temperature: float = 1.0, form: str = "log_mean_exp"
) -> FloatArray:
    """-t * log(mean_k exp(-v_k/t)), a smooth minimum: -> min as t -> 0, -> mean as t -> inf. Monotone.

    Computed around the row's minimum with expm1/log1p: exact in both limits, no overflow for any finite v.

    Args:
        temperature: t > 0, in units of v.
        form: "softmin_mean" is sum_k softmin(v/t)_k * v_k, the intent of the original code. That form is NOT
            monotone: (0, 1) scores 0.2689 and the better (0, 6) only 0.0148, so a policy can gain by getting worse.
    """
    t = _positive("temperature", temperature)
    if form not in SOFT_FORMS:
        raise ScalarizerError(unknown("form", form, SOFT_FORMS))
    lowest_B = worst_case(terms)
    above_BK = np.where(terms.present_BK, terms.weighted_BK - lowest_B[:, None], 0.0)
    with np.errstate(over="ignore"):  # a tiny t sends a gap to infinity, whose weight is rightly 0
        exponent_BK = -above_BK / t
    if form == "softmin_mean":
        share_BK = np.where(terms.present_BK, np.exp(exponent_BK), 0.0)
        gap_B = (share_BK * above_BK).sum(axis=1) / share_BK.sum(axis=1)
        return np.asarray(lowest_B + gap_B)
    mean_B = np.where(terms.present_BK, np.expm1(exponent_BK), 0.0).sum(axis=1) / terms.count_B
    return np.asarray(lowest_B - t * np.log1p(mean_B))


def uncertainty_weighted(terms: Terms, *, lam: float = 0.5) -> FloatArray:
    """mean_k v - lam * population variance_k v.

    NOT monotone for large spreads: raising v_k lowers the reward once v_k - mean(v) > 1/(2*lam), because the variance
    grows with the square of the spread. A policy that is good at one principle only is then pulled back.

    Args:
        lam: weight of the variance, >= 0, in 1/units of v.
    """
    weight = _number("lam", lam)
    if weight < 0.0:
        raise ScalarizerError(f"lam is {lam}; it must be 0 or more")
    mean_B = terms.weighted_BK.sum(axis=1) / terms.count_B
    gap_BK = np.where(terms.present_BK, terms.weighted_BK - mean_B[:, None], 0.0)
    variance_B = np.square(gap_BK).sum(axis=1) / terms.count_B
    return np.asarray(mean_B - weight * variance_B)


def lower_quantile(terms: Terms, *, q: float = 1.0 / 3.0) -> FloatArray:
    """Mean of the lowest max(1, floor(q*K)) values of v - across principles, never across the batch. Monotone.

    Args:
        q: share of principles in (0, 1]; K counts the present ones. q = 1 is the mean.
    """
    share = _number("q", q)
    if not 0.0 < share <= 1.0:
        raise ScalarizerError(f"q is {q}; it must lie in (0, 1]")
    num_B = np.maximum(1, np.floor(share * terms.count_B + FLOOR_GUARD))
    taken_BK = np.arange(terms.weighted_BK.shape[1])[None, :] < num_B[:, None]
    return np.asarray(np.where(taken_BK, _ascending(terms), 0.0).sum(axis=1) / num_B)


def max_median(terms: Terms) -> FloatArray:
    """median_k v; for an even number of principles the mean of the two middle values. Monotone (not strictly)."""
    ordered_BK = _ascending(terms)
    low_B1 = ((terms.count_B - 1) // 2)[:, None]
    high_B1 = (terms.count_B // 2)[:, None]
    low_B = np.take_along_axis(ordered_BK, low_B1, axis=1)[:, 0]
    high_B = np.take_along_axis(ordered_BK, high_B1, axis=1)[:, 0]
    return np.asarray(0.5 * low_B + 0.5 * high_B)


def bernoulli_nash(terms: Terms, *, log: bool = False) -> FloatArray:
    """exp(sum_k a_k * log sigmoid(u_k)): the weighted geometric mean of Bernoulli utilities, in (0, 1). Monotone.

    Utilities must be positive, hence the sigmoid: a product of raw scores (the original code) gives the same value
    to an all-good response and to one with two bad scores.

    Args:
        log: return the exponent instead, (-inf, 0): the same ranking without saturation at 0.
    """
    if not isinstance(log, (bool, np.bool_)):
        raise ScalarizerError(f"log is {log!r}; it must be true or false")
    importance_BK = np.where(terms.present_BK, terms.importance_K[None, :], 0.0)
    share_BK = importance_BK / importance_BK.sum(axis=1, keepdims=True)
    log_utility_BK = -np.logaddexp(0.0, -terms.oriented_BK)
    exponent_B = (share_BK * log_utility_BK).sum(axis=1)
    return np.asarray(exponent_B if log else np.exp(exponent_B))


@dataclass(frozen=True, slots=True)
class Scalarizer:
    """A named formula with its parameters. Calling it is `scalarize(name, ...)`."""

    name: str
    formula: Callable[..., FloatArray]
    monotone: bool
    """Raising one oriented score never lowers the reward, at the default parameters' form."""
    parameters: tuple[str, ...] = ()
    """Keyword parameters of the formula."""

    def __call__(
        self,
        scores_BK: npt.ArrayLike,
        weights_K: npt.ArrayLike | None = None,
        *,
        weighting: Weighting = "multiply",
        missing: Missing = "error",
        columns: Sequence[str] | None = None,
        **params: Any,
    ) -> FloatArray:
        self.check_parameters(params)
        terms = make_terms(scores_BK, weights_K, weighting, missing, columns)
        return self.formula(terms, **params)

    def check_parameters(self, params: Mapping[str, Any]) -> None:
        """ScalarizerError where a parameter's name is not one of this scalarizer's, or its value is impossible."""
        for name in params:
            if name not in self.parameters:
                known = (*self.parameters, "weighting", "missing")
                raise ScalarizerError(f"{self.name}: " + unknown("parameter", name, known))
        self.formula(_ONE_ROW, **params)


_ONE_ROW = make_terms([[0.0]], None)

SCALARIZERS: dict[str, Scalarizer] = {
    "linear": Scalarizer("linear", linear, monotone=True),
    "worst_case": Scalarizer("worst_case", worst_case, monotone=True),
    "soft_max_min": Scalarizer("soft_max_min", soft_max_min, True, ("temperature", "form")),
    "uncertainty_weighted": Scalarizer(
        "uncertainty_weighted", uncertainty_weighted, False, ("lam",)
    ),
    "lower_quantile": Scalarizer("lower_quantile", lower_quantile, True, ("q",)),
    "max_median": Scalarizer("max_median", max_median, monotone=True),
    "bernoulli_nash": Scalarizer("bernoulli_nash", bernoulli_nash, True, ("log",)),
}
"""Every scalarizer by name, in the order of `config.learning.ALL_SCALARIZERS`."""


def find_scalarizer(name: str) -> Scalarizer:
    """The scalarizer of that name; ScalarizerError with the nearest name where there is none."""
    if name not in SCALARIZERS:
        raise ScalarizerError(unknown("scalarizer", name, SCALARIZERS))
    return SCALARIZERS[name]


def scalarize(
    name: str, scores_BK: npt.ArrayLike, weights_K: npt.ArrayLike | None = None, **params: Any
) -> FloatArray:
    """One reward per row of normalised scores, by the scalarizer `name`.

    Args:
        name: a key of `SCALARIZERS`.
        scores_BK: normalised scores z, [B, K]; B may be 0. NaN marks a missing score.
        weights_K: signed weights [K]; None: ones. Weight 0 drops the principle.
        **params: the scalarizer's own (`temperature`, `form`, `lam`, `q`, `log`) and, for all of them,
            `weighting` ("multiply": v = w*z; "orient": v = sign(w)*z, equal importance) and
            `missing` ("error"; "renormalise": over the present scores - count them with `count_missing`).

    Returns:
        reward_B, float64 [B], finite.

    Raises:
        ScalarizerError: unknown name or parameter, wrong shape, infinite or missing score (row and column named), a
            row without any score, weights that are all zero or not finite, temperature <= 0, lam < 0, q outside (0, 1].

    Example:
        >>> scalarize("worst_case", [[1.0, -0.5], [0.2, 0.4]], [1.0, -1.0])
        array([ 0.5, -0.4])
    """
    return find_scalarizer(name)(scores_BK, weights_K, **params)


def _ascending(terms: Terms) -> FloatArray:
    """v sorted within each row, missing ones last (as +inf)."""
    return np.sort(np.where(terms.present_BK, terms.weighted_BK, np.inf), axis=1)


def _number(name: str, value: object) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        raise ScalarizerError(f"{name} is {value!r}; it must be a number")
    number = float(value)
    if not np.isfinite(number):
        raise ScalarizerError(f"{name} is {number}; it must be finite")
    return number


def _positive(name: str, value: object) -> float:
    number = _number(name, value)
    if number <= 0.0:
        raise ScalarizerError(f"{name} is {number}; it must be above 0")
    return number
