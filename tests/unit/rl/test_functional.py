"""The arithmetic of PPO against numbers worked out by hand and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, tensor

from morlaif_ray.rl import (
    explained_variance,
    gae,
    kl_penalty,
    place_rewards,
    ppo_policy_loss,
    ppo_value_loss,
)

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

FULL = tensor([[True, True]])


def ragged_mask(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < tensor(lengths).unsqueeze(1)


def test_gae_of_two_tokens_is_worked_out_by_hand() -> None:
    # delta_1 = 2 - 0.25 = 1.75; delta_0 = 1 + 0.9*0.25 - 0.5 = 0.725; A_0 = 0.725 + 0.9*0.8*1.75 = 1.985
    advantages, returns = gae(tensor([[1.0, 2.0]]), tensor([[0.5, 0.25]]), FULL, 0.9, 0.8)
    torch.testing.assert_close(advantages, tensor([[1.985, 1.75]]))
    torch.testing.assert_close(returns, tensor([[2.485, 2.0]]))


def test_gae_with_lambda_zero_is_the_one_step_error() -> None:
    advantages, _ = gae(tensor([[1.0, 2.0]]), tensor([[0.5, 0.25]]), FULL, 1.0, 0.0)
    torch.testing.assert_close(advantages, tensor([[0.75, 1.75]]))


def test_gae_with_lambda_one_is_return_minus_value() -> None:
    advantages, returns = gae(tensor([[1.0, 2.0]]), tensor([[0.5, 0.25]]), FULL, 1.0, 1.0)
    torch.testing.assert_close(returns, tensor([[3.0, 2.0]]))
    torch.testing.assert_close(advantages, tensor([[2.5, 1.75]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.0, 1.0)])
def test_gae_equals_the_sum_of_discounted_errors_on_ragged_responses(
    gamma: float, lam: float
) -> None:
    rng = np.random.default_rng(0)
    lengths, width = [1, 5, 3, 8], 8
    rewards, values = rng.normal(size=(2, 4, width))
    mask = ragged_mask(lengths, width)
    dirty = np.where(mask.numpy(), 0.0, 1e6)  # whatever stands in the padding must not leak
    advantages, returns = gae(
        torch.tensor(rewards + dirty), torch.tensor(values + dirty), mask, gamma, lam
    )
    expected = np.zeros((4, width))
    for row, length in enumerate(lengths):
        v = [*values[row, :length], 0.0]
        delta = [rewards[row, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[row, t] = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
    np.testing.assert_allclose(advantages, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0.0), atol=1e-12)


def test_the_policy_loss_clips_only_where_clipping_is_the_worse_case() -> None:
    # A = +2 at ratio 1.5: clipped to 1.2, -2.4;  A = -2 at 1.5: 3.0
    # A = +2 at ratio 0.5: -1.0;                  A = -2 at 0.5: clipped to 0.8, 1.6
    ratios, advantages = tensor([[1.5, 1.5, 0.5, 0.5]]), tensor([[2.0, -2.0, 2.0, -2.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, metrics = ppo_policy_loss(ratios.log(), torch.zeros(1, 4), advantages, mask, 0.2)
    assert float(loss) == pytest.approx((-2.4 + 3.0 - 1.0 + 1.6) / 4)
    assert float(metrics["clipfrac"]) == pytest.approx(0.5)
    by_hand = ((0.5 - math.log(1.5)) + (-0.5 - math.log(0.5))) / 2
    assert float(metrics["approx_kl"]) == pytest.approx(by_hand, abs=1e-6)


def test_the_policy_loss_has_no_gradient_where_it_is_clipped() -> None:
    logprobs = tensor([[math.log(1.5), math.log(1.5)]], requires_grad=True)
    loss, _ = ppo_policy_loss(logprobs, torch.zeros(1, 2), tensor([[2.0, -2.0]]), FULL, 0.2)
    loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, tensor([[0.0, 2.0 * 1.5 / 2]]))


def test_the_policy_loss_ignores_padding_however_wild() -> None:
    mask = tensor([[True, False]])
    loss, metrics = ppo_policy_loss(
        tensor([[0.0, 500.0]]), torch.zeros(1, 2), tensor([[3.0, 7.0]]), mask, 0.2
    )
    assert float(loss) == pytest.approx(-3.0)
    assert float(metrics["approx_kl"]) == 0.0


def test_the_value_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    # V=1, old 0: clipped to 0.2. R=2: max(1, 3.24)/2 = 1.62; R=0: max(1, 0.04)/2 = 0.5
    loss = ppo_value_loss(
        tensor([[1.0, 1.0]]), tensor([[0.0, 0.0]]), tensor([[2.0, 0.0]]), FULL, 0.2
    )
    assert float(loss) == pytest.approx((1.62 + 0.5) / 2)


def test_micro_batches_with_the_whole_denominator_add_up_to_the_whole_gradient() -> None:
    torch.manual_seed(0)
    mask = ragged_mask([1, 6, 2, 4], 6)
    old, advantages, returns, features = torch.randn(4, 4, 6).double()
    weight = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)

    def gradient(rows: list[slice]) -> Tensor:
        weight.grad = None
        for part in rows:
            logprobs, values = weight[0] * features[part], weight[1] * features[part]
            total = mask.sum()
            policy, _ = ppo_policy_loss(
                logprobs, old[part], advantages[part], mask[part], 0.2, total
            )
            value = ppo_value_loss(values, old[part], returns[part], mask[part], 0.2, total)
            (policy + value).backward()
        assert weight.grad is not None
        return weight.grad.clone()

    whole = gradient([slice(0, 4)])
    torch.testing.assert_close(gradient([slice(0, 1), slice(1, 3), slice(3, 4)]), whole)
    # The mean of micro-batch means is something else, because the micro-batches differ in length.
    weight.grad = None
    for part in (slice(0, 1), slice(1, 4)):
        loss, _ = ppo_policy_loss(
            weight[0] * features[part], old[part], advantages[part], mask[part], 0.2
        )
        (loss / 2).backward()
    assert weight.grad is not None
    assert not torch.allclose(weight.grad[0], whole[0])


def test_k1_and_k3_of_one_token() -> None:
    policy, reference = tensor([[-1.0]]), tensor([[-1.5]])
    assert float(kl_penalty(policy, reference)) == pytest.approx(0.5)
    assert float(kl_penalty(policy, reference, "k3")) == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    assert float(kl_penalty(reference, policy)) == pytest.approx(-0.5)
    assert float(kl_penalty(reference, policy, "k3")) == pytest.approx(math.exp(0.5) - 1 - 0.5)


def test_both_estimators_average_to_the_divergence() -> None:
    p, q = tensor([[0.5, 0.3, 0.2]]).double(), tensor([[0.2, 0.2, 0.6]]).double()
    exact = float((p * (p / q).log()).sum())
    assert float((p * kl_penalty(p.log(), q.log())).sum()) == pytest.approx(exact)
    k3 = kl_penalty(p.log(), q.log(), "k3")
    assert float((p * k3).sum()) == pytest.approx(exact)
    assert bool((k3 >= 0).all())


def test_the_score_lands_on_the_last_response_token() -> None:
    kl = tensor([[1.0, 2.0, 9.0], [0.5, 9.0, 9.0], [1.0, 1.0, -1.0]])
    rewards = place_rewards(kl, ragged_mask([2, 1, 3], 3), tensor([10.0, -4.0, 0.0]), 0.1)
    torch.testing.assert_close(
        rewards, tensor([[-0.1, 9.8, 0.0], [-4.05, 0.0, 0.0], [-0.1, -0.1, 0.1]])
    )
    assert kl[0, 1] == 2.0  # the input is left alone


@pytest.mark.parametrize(
    ("values", "share"), [([1.0, 2.0, 3.0], 1.0), ([1.0, 1.0, 1.0], 0.0), ([1.0, 2.0, 2.0], 2 / 3)]
)
def test_explained_variance_by_hand(values: list[float], share: float) -> None:
    mask = tensor([[True, True, True, False]])
    got = explained_variance(tensor([[*values, 50.0]]), tensor([[1.0, 2.0, 3.0, -50.0]]), mask)
    assert got == pytest.approx(share)


def test_explained_variance_of_equal_returns_is_nan() -> None:
    assert math.isnan(explained_variance(tensor([[1.0, 2.0]]), tensor([[3.0, 3.0]]), FULL))
