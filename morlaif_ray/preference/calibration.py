"""Is a preference model's probability sigmoid(r_a - r_b) right? Temperature, and the error before and after it.

Contract: NumPy only, pure. A pair's label is the probability that a is better (the judge's, or a person's 0 or 1), NaN
where there is none. Which response is called a is arbitrary, so all figures stay the same when pairs are swapped.
Legend: N pairs, M bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from morlaif_ray.types import FloatArray

NUM_BINS = 10
"""Bins of equal width over the confidence 0.5 .. 1."""
_LARGEST_SLOPE = (
    1e4  # of D/T, in units of the differences' own spread: beyond it the data are separable
)


@dataclass(frozen=True)
class Calibration:
    """Of one model on one set of pairs."""

    error: float
    """Expected calibration error: mean over bins of |mean confidence - share that agrees|, by pairs in the bin
    (Guo et al. 2017); NaN without pairs."""
    log_loss: float
    """Mean cross-entropy (nats) against the label."""
    num: int
    """Pairs with a label."""


def fit_temperature(differences_N: FloatArray, labels_N: FloatArray) -> float:
    """T > 0 for which sigmoid(D/T) has the highest likelihood of the labels; NaN where there is none.

    None: no labelled pair with different scores; a model that points the wrong way (best T negative or infinite);
    labels without any disagreement (best T = 0). The likelihood is concave in 1/T, so its slope has one zero.
    """
    seen = ~np.isnan(labels_N) & ~np.isnan(differences_N) & (differences_N != 0.0)
    if not seen.any():
        return float("nan")
    difference, label = differences_N[seen], labels_N[seen]
    unit = float(np.abs(difference).mean())
    scaled = difference / unit

    def slope(inverse: float) -> float:
        return float(((label - _sigmoid(inverse * scaled)) * scaled).sum())

    low, high = 0.0, 1.0
    slope_at_infinity = float(((label - (scaled > 0.0)) * scaled).sum())
    if slope(low) <= 0.0 or slope_at_infinity >= 0.0:
        return float("nan")
    while slope(high) > 0.0:
        low, high = high, 2.0 * high
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0.0 else (low, middle)
    return unit / (0.5 * (low + high))


def measure_calibration(
    differences_N: FloatArray,
    labels_N: FloatArray,
    temperature: float = 1.0,
    *,
    num_bins: int = NUM_BINS,
) -> Calibration:
    """Calibration of sigmoid(D/T) against the labels, each pair turned so that the model's choice comes first."""
    seen = ~np.isnan(labels_N) & ~np.isnan(differences_N)
    if not seen.any() or not np.isfinite(temperature):
        return Calibration(float("nan"), float("nan"), int(seen.sum()))
    probability = _sigmoid(differences_N[seen] / temperature)
    label = labels_N[seen]
    confidence = np.maximum(probability, 1.0 - probability)
    agreement = np.where(probability == 0.5, 0.5, np.where(probability > 0.5, label, 1.0 - label))
    bin_N = np.minimum(((confidence - 0.5) * 2.0 * num_bins).astype(np.int64), num_bins - 1)
    gap_M = np.bincount(bin_N, weights=confidence - agreement, minlength=num_bins)
    clipped = np.clip(confidence, 1e-12, 1.0 - 1e-12)
    loss = -agreement * np.log(clipped) - (1.0 - agreement) * np.log1p(-clipped)
    return Calibration(float(np.abs(gap_M).sum() / len(label)), float(loss.mean()), int(seen.sum()))


def _sigmoid(x_N: FloatArray) -> FloatArray:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x_N)))
