"""Every pure function of PPO against the plain loops of `slow_reference.py`, on ragged random batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from morlaif_ray.rl import gae, kl_penalty, place_rewards, ppo_policy_loss, ppo_value_loss
from morlaif_ray.rl.advantages import estimate_advantages
from morlaif_ray.rl.functional import truncated_importance
from morlaif_ray.tensor_ops import masked_whiten
from tests.unit.rl import slow_reference as slow

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

LENGTHS = (1, 7, 3, 5, 7, 2)
WIDTH = 7
MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS).unsqueeze(1)


def draw(seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Random numbers, with nonsense in the padding that must not matter."""
    rng = np.random.default_rng(seed)
    values = torch.tensor(rng.normal(shift, scale, MASK.shape))
    return torch.where(MASK, values, torch.full_like(values, 3.0))


def rows(values: Tensor) -> slow.Rows:
    return [values[i, :length].tolist() for i, length in enumerate(LENGTHS)]


def assert_same(values: Tensor, expected: slow.Rows) -> None:
    for i, length in enumerate(LENGTHS):
        assert values[i, :length].tolist() == pytest.approx(expected[i], rel=1e-9, abs=1e-9)


@pytest.fixture(params=range(3))
def seed(request: pytest.FixtureRequest) -> int:
    return 10 * int(request.param)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_and_reward_placement(seed: int, estimator: str) -> None:
    logprobs, reference = draw(seed, shift=-2.0), draw(seed + 1, shift=-2.0)
    score = torch.tensor(np.random.default_rng(seed).normal(size=len(LENGTHS)))
    kl = kl_penalty(logprobs, reference, estimator)  # type: ignore[arg-type]
    expected = [
        slow.kl_terms(a, b, estimator) for a, b in zip(rows(logprobs), rows(reference), strict=True)
    ]
    assert_same(kl, expected)
    placed = place_rewards(kl, MASK, score, 0.3)
    assert_same(
        placed, [slow.token_rewards(k, float(s), 0.3) for k, s in zip(expected, score, strict=True)]
    )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 0.3)])
def test_gae_and_whitening(seed: int, gamma: float, lam: float) -> None:
    rewards, values = draw(seed), draw(seed + 1)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    expected = [
        slow.gae_row(r, v, gamma, lam) for r, v in zip(rows(rewards), rows(values), strict=True)
    ]
    assert_same(advantages, [row[0] for row in expected])
    assert_same(returns, [row[1] for row in expected])
    white = masked_whiten(advantages, MASK)
    assert_same(white, slow.whiten([row[0] for row in expected]))


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_group_estimators(seed: int, estimator: str, n: int) -> None:
    rewards = draw(seed, scale=2.0)
    advantages, _ = estimate_advantages(
        estimator, rewards, torch.zeros_like(rewards), MASK, gamma=1.0, lam=0.95, samples_per_prompt=n
    )  # type: ignore[arg-type]  # fmt: skip
    totals = [sum(row) for row in rows(rewards)]
    made = (slow.rloo_totals if estimator == "rloo" else slow.grpo_totals)(totals, n)
    assert_same(advantages, [[a] * length for a, length in zip(made, LENGTHS, strict=True)])


@pytest.mark.parametrize("cap", [None, 1.0, 2.5])
def test_losses_with_and_without_importance_weights(seed: int, cap: float | None) -> None:
    logprobs, old, engine = (draw(seed + i, 0.4, -2.0) for i in range(3))
    advantages = draw(seed + 3)
    weights = None
    expected_weights = [[1.0] * length for length in LENGTHS]
    if cap is not None:
        weights, _ = truncated_importance(old, engine, MASK, cap)
        expected_weights = [
            slow.importance_weights(o, e, cap) for o, e in zip(rows(old), rows(engine), strict=True)
        ]
        assert_same(weights, expected_weights)
    loss, metrics = ppo_policy_loss(logprobs, old, advantages, MASK, 0.2, weights_BT=weights)
    made = (loss, metrics["approx_kl"], metrics["clipfrac"])
    expected = slow.policy_loss(rows(logprobs), rows(old), rows(advantages), expected_weights, 0.2)
    assert [float(x) for x in made] == pytest.approx(expected, rel=1e-9)
    assert 0.0 < expected[2] < 1.0  # clipped and unclipped tokens were both there


def test_value_loss(seed: int) -> None:
    values, old, returns = draw(seed), draw(seed + 1), draw(seed + 2)
    expected = slow.value_loss(rows(values), rows(old), rows(returns), 0.2)
    assert float(ppo_value_loss(values, old, returns, MASK, 0.2)) == pytest.approx(expected)
