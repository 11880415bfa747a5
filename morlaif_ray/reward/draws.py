"""The offline sweep: how accuracy depends on scalarizer, its parameter and the weights, on cached scores.

One batch of draws per scalarizer: draw 0 is the configured one; the others spread the weights log-normally around it
(signs kept) and draw the scalarizer's parameter. Split `weights` selects the best draw, split `test` only reports it:
an accuracy on the pairs that chose the draw would flatter it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morlaif_ray.config.learning import RewardConfig
from morlaif_ray.reward.bootstrap import bootstrap_shares
from morlaif_ray.reward.fit import scalarizer_credit
from morlaif_ray.reward.function import RewardFunction, configured_parameters
from morlaif_ray.reward.pairs import PairScores
from morlaif_ray.reward.scalarizers import SCALARIZERS
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import FloatArray

TEMPERATURES = (0.05, 20.0)  # log-uniform: from almost the minimum to almost the mean
LAMBDAS = (0.0, 2.0)  # uniform


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """One way to combine the principles."""

    scalarizer: str
    weights_K: FloatArray
    params: dict[str, float]
    """At most one parameter."""
    weight_scale: float
    """Geometric mean of |drawn weight| / |configured weight|: 1 where the overall scale is as configured."""


def make_draws(
    scalarizer: str,
    base: RewardFunction,
    config: RewardConfig,
    *,
    num_draws: int,
    spread: float,
    seed: int,
) -> list[Draw]:
    """The configured draw and `num_draws` - 1 random ones. Depends on the arguments alone.

    Args:
        base: holds the configured weights.
        spread: standard deviation of log(drawn/configured weight).
    """
    configured = configured_parameters(scalarizer, config)
    draws = [Draw(scalarizer, base.weights_K, configured, 1.0)][:num_draws]
    rng = np.random.default_rng(derive_seed(seed, "sweep", scalarizer))
    num_principles = int(np.count_nonzero(base.weights_K))
    for _ in range(num_draws - 1):
        log_factor_K = spread * rng.standard_normal(len(base.weights_K))
        used_K = log_factor_K[base.weights_K != 0.0]
        params = {key: _draw_parameter(key, rng, num_principles) for key in configured}
        scale = float(np.exp(used_K.mean()))
        draws.append(Draw(scalarizer, base.weights_K * np.exp(log_factor_K), params, scale))
    return draws


def evaluate_draws(
    draws: Sequence[Draw],
    base: RewardFunction,
    config: RewardConfig,
    select: PairScores,
    test: PairScores,
) -> list[dict[str, Any]]:
    """One row per draw: accuracy on both splits (complete pairs only), its parameter, its weights."""
    rows = []
    for trial, draw in enumerate(draws):
        means = [
            float(
                scalarizer_credit(
                    draw.scalarizer, draw.params, draw.weights_K, config, base.normaliser, pairs
                ).mean()
            )
            for pairs in (select, test)
        ]
        parameter, value = next(iter(draw.params.items()), ("", None))
        rows.append(
            {
                "trial": trial,
                "scalarizer": draw.scalarizer,
                "parameter": parameter,
                "value": value,
                "weight_scale": draw.weight_scale,
                "accuracy_weights": means[0],
                "accuracy": means[1],
                "weights": [float(weight) for weight in draw.weights_K],
            }
        )
    return rows


def choose_best(
    rows: Sequence[dict[str, Any]],
    base: RewardFunction,
    config: RewardConfig,
    test: PairScores,
    seed: int,
) -> dict[str, Any]:
    """`best.json`: the best draw per scalarizer and overall by accuracy on split `weights`, reported on `test`.

    Equal accuracies go to the earlier row, so to the configured draw where it is among them.
    """
    by_name: dict[str, Any] = {}
    for name in SCALARIZERS:
        mine = [row for row in rows if row["scalarizer"] == name]
        if mine:
            by_name[name] = _describe(max(mine, key=_selection_key), base, config, test, seed)
    best = max(rows, key=_selection_key)["scalarizer"] if rows else None
    return {
        "selected_on": "weights",
        "reported_on": "test",
        "best": best,
        "scalarizers": by_name,
    }


def _selection_key(row: dict[str, Any]) -> float:
    return float(row["accuracy_weights"])


def _describe(
    row: dict[str, Any], base: RewardFunction, config: RewardConfig, test: PairScores, seed: int
) -> dict[str, Any]:
    params = {row["parameter"]: row["value"]} if row["parameter"] else {}
    weights_K = np.array(row["weights"], dtype=np.float64)
    credit_N = scalarizer_credit(
        row["scalarizer"], params, weights_K, config, base.normaliser, test
    )
    share = bootstrap_shares(
        credit_N[:, None], test.prompt_ids, derive_seed(seed, "accuracy")
    ).interval(0)
    return {
        "trial": row["trial"],
        "parameters": params,
        "weights": dict(zip(base.principles, row["weights"], strict=True)),
        "accuracy_weights": row["accuracy_weights"],
        "accuracy": share.value,
        "low": share.low,
        "high": share.high,
        "num": share.num,
    }


def _draw_parameter(name: str, rng: np.random.Generator, num_principles: int) -> float:
    if name == "temperature":
        low, high = np.log(TEMPERATURES)
        return float(np.exp(rng.uniform(low, high)))
    if name == "lam":
        return float(rng.uniform(*LAMBDAS))
    assert name == "q", name
    return float(rng.integers(1, num_principles + 1) / num_principles)
