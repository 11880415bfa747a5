"""Synthetic pairs whose true weights are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from morlaif_ray.reward import Normaliser, PairScores, RewardInputs

PRINCIPLES = ("helpfulness", "bias", "detail", "sycophancy")
BASELINES = ("random_principle", "human_labels")
TRUE_WEIGHTS = np.array([1.0, 0.3, 0.5, -0.8])  # on scores divided by SPREAD
SPREAD = np.array([1.0, 0.1, 5.0, 2.0])


def make_pairs(num: int, seed: int, prefix: str = "w", pairs_per_prompt: int = 1) -> PairScores:
    rng = np.random.default_rng(seed)
    a_NK, b_NK = (rng.normal(0.7, 1.0, (num, 4)) * SPREAD for _ in range(2))
    logit_N = ((a_NK - b_NK) / SPREAD) @ TRUE_WEIGHTS
    labels_N = (rng.random(num) < 1.0 / (1.0 + np.exp(-logit_N))).astype(float)
    baseline_a = np.stack([a_NK[:, 0], rng.normal(size=num)], axis=1)
    baseline_b = np.stack([b_NK[:, 0], rng.normal(size=num)], axis=1)
    return PairScores(
        principles=PRINCIPLES,
        baselines=BASELINES,
        pair_ids=tuple(f"{prefix}{row}" for row in range(num)),
        prompt_ids=tuple(f"{prefix}prompt{row // pairs_per_prompt}" for row in range(num)),
        labels_N=labels_N,
        scores_a_NK=a_NK,
        scores_b_NK=b_NK,
        baseline_a_NJ=baseline_a,
        baseline_b_NJ=baseline_b,
    )


def make_inputs(train: PairScores, test: PairScores) -> RewardInputs:
    odds = {
        pair_id: dict(zip(PRINCIPLES, row, strict=True))
        for pairs in (train, test)
        for pair_id, row in zip(pairs.pair_ids, pairs.differences_NK / SPREAD, strict=True)
    }
    return RewardInputs(
        normaliser=Normaliser.fit(train.scores_a_NK, PRINCIPLES),
        weights=train,
        test=test,
        judge_odds=odds,
        num_judgements=dict.fromkeys(PRINCIPLES, 100) | dict.fromkeys(BASELINES, 90),
    )


@pytest.fixture
def pairs() -> Callable[..., PairScores]:
    return make_pairs


@pytest.fixture
def inputs() -> Callable[[PairScores, PairScores], RewardInputs]:
    return make_inputs


@pytest.fixture
def true_weights() -> np.ndarray:
    return TRUE_WEIGHTS
