"""Logistic regression of human labels on score differences: the weights of the principles.

Model: P(a preferred) = sigmoid(sum_k beta_k * d_k / D_k), with d_k = s_a,k - s_b,k the difference of raw scores and D_k
its standard deviation. No intercept: swapping a and b must turn p into 1 - p. For the same reason D_k is taken about 0,
the mean of a difference whose sign depends on which response is called a; so D, and with it the fit, does not.

From coefficients to weights. Scalarizers act on z_k = (s_k - mu_k)/sigma_k, hence z_a,k - z_b,k = d_k/sigma_k. The
logit of a pair is sum_k beta_k*d_k/D_k = sum_k (beta_k*sigma_k/D_k) * (z_a,k - z_b,k), so

    weight_k = beta_k * sigma_k / D_k

makes `linear` on z rank every pair exactly as the regression's logit (mu cancels). beta_k (per standard deviation of
differences) is the figure to compare principles by; weight_k is the one to apply. Both are kept, with D.

Legend: N pairs, K principles, R refits (bootstrap resamples or subsets of principles).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morlaif_ray.errors import DataError, NumericalError
from morlaif_ray.reward.bootstrap import COVERAGE, cluster_index, resample_counts
from morlaif_ray.types import BoolArray, FloatArray

RIDGE = 1e-3
"""Default of `reward.ridge`: 0.5*RIDGE*|beta|^2 on the summed log-loss (scikit-learn: C = 1000), a thousandth of a
pair's weight. It moves no digit that matters and keeps resamples that happen to be separable finite."""
MIN_LABELLED_PAIRS = 20
_TOLERANCE = 1e-9  # largest gradient entry per pair at which Newton's method stops
_MAX_STEPS = 100
_CHUNK_ENTRIES = 2_000_000  # refits x pairs held at a time: 16 MB an array


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """A fitted, intercept-free logistic regression. Coefficients are per standard deviation of differences."""

    coefficient_K: FloatArray
    low_K: FloatArray
    """2.5% bootstrap percentile of the coefficient."""
    high_K: FloatArray
    diff_scale_K: FloatArray
    """D: standard deviation about 0 of the differences, in their own units."""
    accuracy: float
    """On the pairs of the fit, ties half."""
    num_pairs: int

    def logit(self, differences_NK: FloatArray) -> FloatArray:
        """Log-odds (nats) that a is preferred."""
        return np.asarray((differences_NK / self.diff_scale_K) @ self.coefficient_K)

    def weight_factor_K(self, std_K: FloatArray) -> FloatArray:
        """sigma_k/D_k: times a coefficient, the weight that acts on z = (s - mu)/sigma (see the module's head)."""
        return np.asarray(std_K / self.diff_scale_K)


def fit_regression(
    differences_NK: FloatArray,
    labels_N: FloatArray,
    prompt_ids: Sequence[str],
    names: Sequence[str],
    *,
    num_bootstrap: int,
    seed: int,
    allow_separable: bool = False,
    ridge: float = RIDGE,
    nonnegative: bool = False,
) -> Regression:
    """Fits by scikit-learn (non-negative: L-BFGS-B), with intervals from refits on resampled prompts.

    Args:
        differences_NK: score (or log-odds) of a minus that of b, finite.
        labels_N: 1.0 or 0.0.
        allow_separable: accept data that some direction separates perfectly; only the direction then means anything.
        ridge: 0.5*ridge*|beta|^2 is added to the summed log-loss.
        nonnegative: no coefficient below 0.

    Raises:
        DataError: fewer than 20 pairs, labels of one class, a principle with the same score everywhere, or data
            that are perfectly separable.
    """
    check_labels(labels_N)
    scale_K = difference_scale(differences_NK, names)
    features_NK = differences_NK / scale_K
    signed_NK = features_NK * (2.0 * labels_N - 1.0)[:, None]
    rough_K = refit(signed_NK, ridge=ridge)[0]
    allow_separable = (
        allow_separable or ridge > RIDGE
    )  # whoever asks for a penalty gets finite weights
    if not allow_separable and not (signed_NK @ rough_K < 0.0).any():
        raise DataError(
            f"the weights cannot be fitted: {len(labels_N)} labelled pairs are separated without error by "
            f"{len(names)} principles, so no finite weights are best; label more pairs (data splits, "
            f"'weights'), use fewer principles, raise reward.ridge, or set reward.weights"
        )
    coefficient_K = _fit_sklearn(features_NK, labels_N, ridge)
    if nonnegative:
        coefficient_K = _fit_nonnegative(signed_NK, ridge)
    cluster_N, num_clusters = cluster_index(prompt_ids)
    options: dict[str, Any] = {"ridge": ridge, "nonnegative": nonnegative, "start_K": rough_K}
    resampled = [
        refit(signed_NK, counts_RC[:, cluster_N], **options)
        for counts_RC in resample_counts(num_clusters, num_bootstrap, seed)
    ]
    low_K, high_K = np.percentile(np.concatenate(resampled), COVERAGE, axis=0)
    agreement_N = np.sign(signed_NK @ coefficient_K)
    return Regression(
        coefficient_K=coefficient_K,
        low_K=np.asarray(low_K),
        high_K=np.asarray(high_K),
        diff_scale_K=scale_K,
        accuracy=float(0.5 * (1.0 + agreement_N.mean())),
        num_pairs=len(labels_N),
    )


def check_labels(labels_N: FloatArray) -> None:
    """DataError where no regression can be fitted to these labels."""
    if len(labels_N) < MIN_LABELLED_PAIRS:
        raise DataError(
            f"the weights cannot be fitted: {len(labels_N)} pairs of split 'weights' have a human label and all "
            f"scores, at least {MIN_LABELLED_PAIRS} are needed; enlarge that split, or set reward.weights"
        )
    if labels_N.min() == labels_N.max():
        side = "a" if labels_N[0] == 1.0 else "b"
        raise DataError(
            f"the weights cannot be fitted: all {len(labels_N)} human labels prefer response_{side}, so the "
            f"order gives the answer away; shuffle which response comes first, or set reward.weights"
        )


def difference_scale(differences_NK: FloatArray, names: Sequence[str]) -> FloatArray:
    """D_k, the standard deviation about 0 of each column's differences; DataError where it is 0."""
    scale_K = np.sqrt(np.square(differences_NK).mean(axis=0))
    for name, scale in zip(names, scale_K, strict=True):
        if not scale > 0.0:
            raise DataError(
                f"'{name}' gives both responses of every pair the same score; "
                f"train its preference model again or leave the principle out"
            )
    return np.asarray(scale_K)


def refit(
    signed_NK: FloatArray,
    counts_RN: FloatArray | None = None,
    active_RK: BoolArray | None = None,
    start_K: FloatArray | None = None,
    *,
    ridge: float = RIDGE,
    nonnegative: bool = False,
) -> FloatArray:
    """R weighted regressions at once by damped Newton steps; non-negative ones one by one (L-BFGS-B).

    Args:
        signed_NK: features of chosen minus rejected (the label's sign multiplied in), scaled.
        counts_RN: how often each pair counts in each refit; None: once.
        active_RK: which principles each refit may use; None: all. The others get coefficient 0.
        start_K: where to start.

    Returns:
        coefficients beta_RK, the minimum of sum_n c_n*log(1 + exp(-signed_n . beta)) + 0.5*ridge*|beta|^2.
    """
    if nonnegative:
        return _refit_nonnegative(signed_NK, counts_RN, active_RK, ridge)
    num_pairs, num_columns = signed_NK.shape
    rows = max(len(item) for item in (counts_RN, active_RK, [0]) if item is not None)
    products_NKK = (signed_NK[:, :, None] * signed_NK[:, None, :]).reshape(
        num_pairs, num_columns**2
    )
    chunk = max(1, _CHUNK_ENTRIES // max(1, num_pairs))
    results = []
    for first in range(0, rows, chunk):
        part = slice(first, min(rows, first + chunk))
        size = part.stop - part.start
        counts = np.ones((1, num_pairs)) if counts_RN is None else counts_RN[part]
        active = (
            np.ones((size, num_columns))
            if active_RK is None
            else active_RK[part].astype(np.float64)
        )
        start = np.zeros(num_columns) if start_K is None else start_K
        results.append(_newton(signed_NK, products_NKK, counts, active, start * active, ridge))
    return np.concatenate(results)


def _newton(
    signed_NK: FloatArray,
    products_NKK: FloatArray,
    counts_RN: FloatArray,
    active_RK: FloatArray,
    beta_RK: FloatArray,
    ridge: float,
) -> FloatArray:
    """Newton's method with step halving, all R problems in step; rows that have converged drop out."""
    num_columns = signed_NK.shape[1]
    counts_RN = np.broadcast_to(counts_RN, (len(beta_RK), len(signed_NK)))
    beta_RK = beta_RK.copy()
    open_R = np.arange(len(beta_RK))
    for _ in range(_MAX_STEPS):
        beta, counts, active = beta_RK[open_R], counts_RN[open_R], active_RK[open_R]
        margin = beta @ signed_NK.T
        wrong = 0.5 * (1.0 - np.tanh(0.5 * margin))  # sigmoid(-margin) without overflow
        gradient = ((counts * wrong) @ signed_NK - ridge * beta) * active
        is_open = np.abs(gradient).max(axis=1) > _TOLERANCE * counts.sum(axis=1)
        if not is_open.any():
            return beta_RK
        hessian = ((counts * wrong * (1.0 - wrong)) @ products_NKK).reshape(
            -1, num_columns, num_columns
        )
        hessian = hessian * active[:, :, None] * active[:, None, :]
        # Inactive columns get a unit diagonal: their step is 0 and the matrix stays invertible.
        diagonal = np.arange(num_columns)
        hessian[:, diagonal, diagonal] += ridge * active + (1.0 - active)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        before = _loss(margin, counts, beta, ridge)
        moved = _halve_until_better(signed_NK, counts, beta, step, before, ridge)
        beta_RK[open_R] = np.where(is_open[:, None], moved, beta)
        open_R = open_R[is_open]
    raise NumericalError(
        f"logistic regression did not converge in {_MAX_STEPS} Newton steps; "
        f"look for principles whose scores are copies of each other"
    )


def _halve_until_better(
    signed_NK: FloatArray,
    counts_RN: FloatArray,
    beta_RK: FloatArray,
    step_RK: FloatArray,
    loss_R: FloatArray,
    ridge: float,
) -> FloatArray:
    """beta + step, with the step of each row halved until its loss does not rise (beyond rounding)."""
    length_R1 = np.ones((len(beta_RK), 1))
    slack_R = 1e-12 * np.abs(loss_R)
    for _ in range(40):
        trial_RK = beta_RK + length_R1 * step_RK
        trial_R = _loss(trial_RK @ signed_NK.T, counts_RN, trial_RK, ridge)
        worse_R = trial_R > loss_R + slack_R
        if not worse_R.any():
            break
        length_R1[worse_R] *= 0.5
    return beta_RK + length_R1 * step_RK


def _loss(
    margin_RN: FloatArray, counts_RN: FloatArray, beta_RK: FloatArray, ridge: float
) -> FloatArray:
    # log(1 + exp(-m)) as max(-m, 0) + log1p(exp(-|m|)): stable, and twice as fast as logaddexp.
    softplus_RN = np.maximum(-margin_RN, 0.0) + np.log1p(np.exp(-np.abs(margin_RN)))
    penalty_R = 0.5 * ridge * np.square(beta_RK).sum(axis=1)
    return np.asarray((counts_RN * softplus_RN).sum(axis=1) + penalty_R)


def _fit_nonnegative(signed_NK: FloatArray, ridge: float) -> FloatArray:
    coefficient_K = refit(signed_NK, ridge=ridge, nonnegative=True)[0]
    if not coefficient_K.any():
        raise DataError(
            "reward.nonnegative leaves no principle a weight: people choose against every one of them; "
            "set reward.nonnegative: false"
        )
    return np.asarray(coefficient_K)


def _refit_nonnegative(
    signed_NK: FloatArray,
    counts_RN: FloatArray | None,
    active_RK: BoolArray | None,
    ridge: float,
) -> FloatArray:
    """`refit` with beta >= 0: a convex problem with bounds, one minimum each."""
    from scipy.optimize import minimize

    num_pairs, num_columns = signed_NK.shape
    counts = np.ones((1, num_pairs)) if counts_RN is None else counts_RN
    active = np.ones((1, num_columns), dtype=np.bool_) if active_RK is None else active_RK
    rows = max(len(counts), len(active))
    counts = np.broadcast_to(counts, (rows, num_pairs))
    active = np.broadcast_to(active, (rows, num_columns))
    beta_RK = np.zeros((rows, num_columns))
    for row in range(rows):
        signed, count = signed_NK[:, active[row]], counts[row]

        def loss(
            beta: FloatArray, signed: FloatArray = signed, count: FloatArray = count
        ) -> tuple[float, FloatArray]:
            margin = signed @ beta
            wrong = 0.5 * (1.0 - np.tanh(0.5 * margin))
            value = _loss(margin[None], count[None], beta[None], ridge)[0]
            return float(value), ridge * beta - (count * wrong) @ signed

        if signed.shape[1]:
            found = minimize(
                loss,
                np.zeros(signed.shape[1]),
                jac=True,
                method="L-BFGS-B",
                bounds=[(0.0, None)] * signed.shape[1],
                options={"maxiter": 1000, "ftol": 1e-14, "gtol": _TOLERANCE * count.sum()},
            )
            beta_RK[row, active[row]] = found.x
    return beta_RK


def _fit_sklearn(features_NK: FloatArray, labels_N: FloatArray, ridge: float) -> FloatArray:
    from sklearn.linear_model import (
        LogisticRegression,
    )  # imports scipy: a second that only fits pay

    model = LogisticRegression(
        C=1.0 / ridge, fit_intercept=False, solver="newton-cholesky", tol=1e-9, max_iter=200
    )
    with warnings.catch_warnings():
        # Copies of a principle make the Hessian near-singular; scikit-learn then falls back to L-BFGS and says so.
        warnings.simplefilter("ignore")
        model.fit(features_NK, labels_N)
    return np.asarray(model.coef_[0], dtype=np.float64)
