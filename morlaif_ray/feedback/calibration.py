"""Does the judge mean its probabilities? Reliability of the soft labels against people, and the expected error.

Which response is called `a` is arbitrary, so a judgement counts once, from the side that the judge prefers:
confidence = max(p, 1 - p) in [0.5, 1], agreement = whether the person chose that side (a judge at 0.5 agrees by half).
A principle need not predict people; where it does not, its error says how wrong it would be to read its soft label
as a probability of human choice. For the overall question (`general`) that is what the label claims to be.

Legend: N judgements. Missing judgements and pairs that nobody labelled are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morlaif_ray.feedback.intervals import NAN, wilson_interval
from morlaif_ray.types import FloatArray, Interval, Judgement

NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Judgements of similar confidence. Produced by `reliability`, consumed by the report."""

    low: float
    """Least confidence of the bin, in [0.5, 1]."""
    high: float
    count: int
    confidence: float
    """Mean confidence inside the bin."""
    agreement: Interval
    """Share of the bin on which the person chose the judge's side."""


def folded(
    judgements: Sequence[Judgement], labels: Mapping[str, float]
) -> tuple[FloatArray, FloatArray]:
    """(confidence_N, agreement_N) of the usable judgements whose pair a person decided. `labels`: pair_id -> label."""
    found = [
        (entry.log_odds, labels.get(entry.pair_id, NAN))
        for entry in judgements
        if entry.status in ("ok", "tie")
    ]
    log_odds_N = np.array([log_odds for log_odds, _ in found], dtype=np.float64)
    label_N = np.array([label for _, label in found], dtype=np.float64)
    keep = ~np.isnan(log_odds_N) & ~np.isnan(label_N) & (label_N != 0.5)
    log_odds_N, label_N = log_odds_N[keep], label_N[keep]
    confidence_N = 1.0 / (1.0 + np.exp(-np.minimum(np.abs(log_odds_N), 60.0)))
    agrees_N = (log_odds_N > 0.0) == (label_N > 0.5)
    return confidence_N, np.where(log_odds_N == 0.0, 0.5, agrees_N.astype(np.float64))


def reliability(
    confidence_N: FloatArray, agreement_N: FloatArray, num_bins: int = NUM_BINS
) -> list[ReliabilityBin]:
    """The reliability curve over equal bins of [0.5, 1]; empty bins are left out, the last one holds 1.0."""
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    bin_N = np.clip(np.searchsorted(edges, confidence_N, side="right") - 1, 0, num_bins - 1)
    bins = []
    for number in range(num_bins):
        inside = bin_N == number
        count = int(inside.sum())
        if count == 0:
            continue
        bins.append(
            ReliabilityBin(
                low=float(edges[number]),
                high=float(edges[number + 1]),
                count=count,
                confidence=float(confidence_N[inside].mean()),
                agreement=wilson_interval(float(agreement_N[inside].sum()), count),
            )
        )
    return bins


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean over judgements of |agreement - confidence| of their bin (Naeini et al. 2015); NaN without judgements."""
    total = sum(entry.count for entry in bins)
    if total == 0:
        return NAN
    gaps = (entry.count * abs(entry.agreement.value - entry.confidence) for entry in bins)
    return math.fsum(gaps) / total


def overconfidence(bins: Sequence[ReliabilityBin]) -> float:
    """Mean confidence minus mean agreement: above 0 the judge claims more than people confirm."""
    total = sum(entry.count for entry in bins)
    if total == 0:
        return NAN
    gaps = (entry.count * (entry.confidence - entry.agreement.value) for entry in bins)
    return math.fsum(gaps) / total


def calibration_rows(
    name: str, judgements: Sequence[Judgement], labels: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Rows of `calibration.csv` for one question."""
    return [
        {
            "principle": name,
            "low": entry.low,
            "high": entry.high,
            "count": entry.count,
            "confidence": entry.confidence,
            "agreement": entry.agreement.value,
            "agreement_low": entry.agreement.low,
            "agreement_high": entry.agreement.high,
        }
        for entry in reliability(*folded(judgements, labels))
    ]
