"""Estimators, importance weights and the learning-rate schedule against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from morlaif_ray.rl.advantages import estimate_advantages, grpo, rloo
from morlaif_ray.rl.controllers import learning_rate_at
from morlaif_ray.rl.functional import ppo_policy_loss, truncated_importance

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

MASK = tensor([[True, True], [True, False], [True, True], [True, True]])
ZEROS = torch.zeros(4, 2)
REWARDS = tensor([[0.5, 0.5], [3.0, 99.0], [0.0, -2.0], [1.0, 3.0]])
"""Summed inside the mask: 1, 3 | -2, 4."""


def test_rloo_subtracts_the_mean_of_the_other_samples() -> None:
    # group (1, 3, 8): 1 - 5.5, 3 - 4.5, 8 - 2; group (0, 0, 6): 0 - 3, 0 - 3, 6 - 0
    made = rloo(tensor([1.0, 3.0, 8.0, 0.0, 0.0, 6.0]), 3)
    torch.testing.assert_close(made, tensor([-4.5, -1.5, 6.0, -3.0, -3.0, 6.0]))


def test_grpo_divides_by_the_groups_own_standard_deviation() -> None:
    # (1, 3, 8): mean 4, sample variance (9 + 1 + 16)/2 = 13
    made = grpo(tensor([1.0, 3.0, 8.0, 2.0, 2.0, 2.0]), 3)
    std = math.sqrt(13.0) + 1e-4
    torch.testing.assert_close(made, tensor([-3 / std, -1 / std, 4 / std, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("estimate", [rloo, grpo])
def test_what_is_no_group_is_an_error_and_not_a_zero(estimate: object, n: int) -> None:
    with pytest.raises(ValueError, match=f"4 responses are no groups of {n}: a group needs at"):
        estimate(torch.zeros(4), n)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("rloo", [-2.0, 2.0, -6.0, 6.0]),
        (
            "grpo",
            [
                -1 / (math.sqrt(2) + 1e-4),
                1 / (math.sqrt(2) + 1e-4),
                -3 / (math.sqrt(18) + 1e-4),
                3 / (math.sqrt(18) + 1e-4),
            ],
        ),
    ],
)
def test_every_token_of_a_response_has_its_responses_advantage(
    estimator: str, expected: list[float]
) -> None:
    advantages, returns = estimate_advantages(
        estimator, REWARDS, ZEROS, MASK, gamma=0.5, lam=0.1, samples_per_prompt=2
    )  # type: ignore[arg-type]
    torch.testing.assert_close(advantages, tensor(expected).unsqueeze(1) * MASK)
    assert not returns.any()


def test_gae_is_whitened_over_the_response_tokens() -> None:
    advantages, returns = estimate_advantages(
        "gae", REWARDS, ZEROS, MASK, gamma=1.0, lam=1.0, samples_per_prompt=1
    )
    # With values 0, gamma and lambda 1 the advantages are the sums to the end: 1, .5 | 3 | -2, -2 | 4, 3
    plain = tensor([1.0, 0.5, 3.0, -2.0, -2.0, 4.0, 3.0])
    torch.testing.assert_close(returns[MASK], plain)
    expected = (plain - plain.mean()) / plain.std(unbiased=False)
    torch.testing.assert_close(advantages[MASK], expected)


def test_importance_weights_are_probability_ratios_up_to_the_cap() -> None:
    old = tensor([[0.5, 0.2, 0.9]]).log()
    engine = tensor([[0.25, 0.4, 0.1]]).log()  # ratios 2, 0.5, 9
    mask = tensor([[True, True, True]])
    weights, metrics = truncated_importance(old, engine, mask, cap=3.0)
    torch.testing.assert_close(weights, tensor([[2.0, 0.5, 3.0]]))
    assert float(metrics["importance_weight_mean"]) == pytest.approx(5.5 / 3)
    assert float(metrics["importance_truncated_share"]) == pytest.approx(1 / 3)


def test_importance_weights_outside_the_mask_are_zero_and_not_counted() -> None:
    old, engine = tensor([[0.0, 50.0]]), tensor([[0.0, 0.0]])
    weights, metrics = truncated_importance(old, engine, tensor([[True, False]]), cap=2.0)
    assert weights.tolist() == [[1.0, 0.0]]
    assert float(metrics["importance_truncated_share"]) == 0.0
    assert float(metrics["importance_weight_mean"]) == 1.0


def test_weights_multiply_the_clipped_loss_token_by_token() -> None:
    # A = +2 at ratio 1.5 clipped to 1.2: -2.4; A = -2 at 1.5: 3.0
    mask = tensor([[True, True]])
    loss, metrics = ppo_policy_loss(
        tensor([[1.5, 1.5]]).log(),
        torch.zeros(1, 2),
        tensor([[2.0, -2.0]]),
        mask,
        0.2,
        weights_BT=tensor([[0.5, 2.0]]),
    )
    assert float(loss) == pytest.approx((0.5 * -2.4 + 2.0 * 3.0) / 2)
    assert float(metrics["clipfrac"]) == pytest.approx(0.5)  # of tokens, not of weights


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_the_rate_warms_up_and_then_follows_its_schedule(schedule: str, rates: list[float]) -> None:
    made = [
        learning_rate_at(step, peak=1.0, warmup_steps=2, num_steps=6, schedule=schedule)  # type: ignore[arg-type]
        for step in range(6)
    ]
    assert made == pytest.approx(rates)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_beyond_its_last_step_the_rate_is_zero(schedule: str) -> None:
    made = learning_rate_at(9, peak=1.0, warmup_steps=2, num_steps=6, schedule=schedule)  # type: ignore[arg-type]
    assert made == pytest.approx(0.0, abs=1e-12)
