"""What each principle adds: principles are removed, the regression is refitted, and held-out pairs say what is lost.

Legend: N test pairs, K principles, O removal orders, R refits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from morlaif_ray.reward.bootstrap import bootstrap_shares, pair_credit
from morlaif_ray.reward.pairs import PairScores
from morlaif_ray.reward.regression import RIDGE, Regression, refit
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import BoolArray, FloatArray


@dataclass(frozen=True, slots=True)
class Ablation:
    """Rows of `ablation.csv` and `drop_one.csv`."""

    removed: list[dict[str, Any]]
    dropped: list[dict[str, Any]]


def ablate(
    fit: Regression,
    train: PairScores,
    test: PairScores,
    *,
    num_orders: int,
    seed: int,
    ridge: float = RIDGE,
    nonnegative: bool = False,
) -> Ablation:
    """Refits without principles, one after the other, in `num_orders` random orders, and without each single one.

    Accuracies are those of the refitted linear model on `test`. Intervals of the curve are over test prompts, for the
    accuracy averaged over orders; `order_std` is the spread between orders.
    """
    signed_NK = train.differences_NK / fit.diff_scale_K * (2.0 * train.labels_N - 1.0)[:, None]
    features_NK = test.differences_NK / fit.diff_scale_K
    num_principles = signed_NK.shape[1]
    orders_RK = _removal_masks(num_principles, num_orders, derive_seed(seed, "ablation orders"))
    single_RK = np.concatenate([np.ones((1, num_principles)), 1.0 - np.eye(num_principles)]) > 0.5
    active_RK = np.concatenate([orders_RK, single_RK])
    beta_RK = refit(
        signed_NK,
        active_RK=active_RK,
        start_K=fit.coefficient_K,
        ridge=ridge,
        nonnegative=nonnegative,
    )
    credit_RN = _credits(beta_RK, features_NK, test.labels_N)
    curve_OKN = credit_RN[: len(orders_RK)].reshape(num_orders, num_principles, -1)
    single_RN = credit_RN[len(orders_RK) :]
    shares_seed = derive_seed(seed, "ablation shares")
    curve = bootstrap_shares(curve_OKN.mean(axis=0).T, test.prompt_ids, shares_seed)
    single = bootstrap_shares(single_RN.T, test.prompt_ids, shares_seed)
    spread_K = curve_OKN.mean(axis=2).std(axis=0)
    removed: list[dict[str, Any]] = []
    for count in range(num_principles):
        share = curve.interval(count)
        removed.append(
            {
                "num_removed": count,
                "accuracy": share.value,
                "low": share.low,
                "high": share.high,
                "order_std": float(spread_K[count]),
            }
        )
    dropped: list[dict[str, Any]] = []
    for column, name in enumerate(train.principles, start=1):
        loss = single.difference(0, column)
        dropped.append(
            {
                "principle": name,
                "accuracy_without": float(single.value_J[column]),
                "loss": loss.value,
                "loss_low": loss.low,
                "loss_high": loss.high,
            }
        )
    return Ablation(removed, dropped)


def _removal_masks(num_principles: int, num_orders: int, seed: int) -> BoolArray:
    """Active principles [O*K, K]: row o*K + r has the first r of order o removed."""
    rng = np.random.default_rng(seed)
    orders_OK = np.stack([rng.permutation(num_principles) for _ in range(num_orders)])
    position_OK = np.argsort(orders_OK, axis=1)  # when each principle goes
    active = position_OK[:, None, :] >= np.arange(num_principles)[None, :, None]
    return np.asarray(active.reshape(num_orders * num_principles, num_principles))


def _credits(beta_RK: FloatArray, features_NK: FloatArray, labels_N: FloatArray) -> FloatArray:
    logit_RN = beta_RK @ features_NK.T
    return pair_credit(logit_RN, np.zeros_like(logit_RN), labels_N)
