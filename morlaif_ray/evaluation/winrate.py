"""From a judge's answers in both orders to wins, losses, ties and a win rate (ALGORITHMS.md section 6).

Contract: pure. A judge with a taste for the first-given response flips its verdict with the order; demanding that both
orders agree turns such verdicts into ties instead of wins. Ties count half. The interval is over prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from morlaif_ray.evaluation.statistics import NUM_RESAMPLES, mean_interval
from morlaif_ray.types import FloatArray, Interval


@dataclass(frozen=True, slots=True)
class WinRate:
    """One policy against one opponent on the same prompts. Produced here, written to `win_rates.csv`."""

    wins: int
    losses: int
    ties: int
    num_missing: int
    """Prompts without a usable answer in one of the orders: left out of the rate, never counted as ties."""
    interval: Interval
    """(wins + ties / 2) / (wins + losses + ties), with its 95% bootstrap interval over prompts."""

    @property
    def num_prompts(self) -> int:
        return self.wins + self.losses + self.ties


def outcome_points(
    log_odds_ab_N: FloatArray, log_odds_ba_N: FloatArray, *, tie_threshold: float = 0.0
) -> FloatArray:
    """Points [N] of the policy: 1 win, 0.5 tie, 0 loss, NaN where an order has no usable answer.

    Both arguments are log-odds (nats) that the *policy's* response is the better one, asked with it given first (ab)
    and given second (ba). An order within `tie_threshold` of 0 decides nothing, so the prompt is a tie.
    """
    ab, ba = np.asarray(log_odds_ab_N, np.float64), np.asarray(log_odds_ba_N, np.float64)
    assert ab.shape == ba.shape, "both orders are asked of the same prompts"
    points = np.full(ab.shape, 0.5)
    points[(ab > tie_threshold) & (ba > tie_threshold)] = 1.0
    points[(ab < -tie_threshold) & (ba < -tie_threshold)] = 0.0
    points[np.isnan(ab) | np.isnan(ba)] = np.nan
    return points


def win_rate(
    log_odds_ab_N: FloatArray,
    log_odds_ba_N: FloatArray,
    *,
    tie_threshold: float = 0.0,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> WinRate:
    """Wins, losses, ties and the win rate of a policy from its order-wise log-odds (see `outcome_points`)."""
    points = outcome_points(log_odds_ab_N, log_odds_ba_N, tie_threshold=tie_threshold)
    return WinRate(
        wins=int(np.sum(points == 1.0)),
        losses=int(np.sum(points == 0.0)),
        ties=int(np.sum(points == 0.5)),
        num_missing=int(np.sum(np.isnan(points))),
        interval=mean_interval(points, num_resamples=num_resamples, seed=seed),
    )
