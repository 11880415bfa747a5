"""Bradley-Terry losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from morlaif_ray.preference.losses import bradley_terry

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

NAN = float("nan")


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_a_hard_label_is_the_log_loss_of_the_difference() -> None:
    # D = 1.5 - 0.5 = 1: -log sigmoid(1) where a won, -log sigmoid(-1) where b won
    a, b = tensor([[1.5], [1.5]]), tensor([[0.5], [0.5]])
    loss = bradley_terry(a, b, tensor([[1.0], [0.0]]))
    assert float(loss) == pytest.approx((softplus(-1.0) + softplus(1.0)) / 2)


def test_a_soft_label_mixes_both_sides() -> None:
    loss = bradley_terry(tensor([[1.0]]), tensor([[0.0]]), tensor([[0.7]]))
    assert float(loss) == pytest.approx(0.7 * softplus(-1.0) + 0.3 * softplus(1.0))


@pytest.mark.parametrize("log_odds", [-3.0, -0.5, 0.0, 1.0, 4.0])
def test_the_optimum_of_a_soft_label_is_the_judges_log_odds(log_odds: float) -> None:
    difference = tensor([[log_odds]], dtype=torch.float64, requires_grad=True)
    label = torch.sigmoid(tensor([[log_odds]], dtype=torch.float64))
    bradley_terry(difference, torch.zeros(1, 1).double(), label).backward()
    assert difference.grad is not None
    assert float(difference.grad) == pytest.approx(0.0, abs=1e-12)
    for other in (log_odds - 0.1, log_odds + 0.1):
        away = bradley_terry(tensor([[other]]).double(), torch.zeros(1, 1).double(), label)
        best = bradley_terry(difference.detach(), torch.zeros(1, 1).double(), label)
        assert float(away) > float(best)


def test_a_margin_asks_for_that_much_more_on_the_winners_side() -> None:
    # D = 1, m = 2: softplus(-(1 - 2)) where a won; softplus(-(-1 - 2)) where b won
    a, b, margin = tensor([[1.0], [1.0]]), tensor([[0.0], [0.0]]), tensor([[2.0], [2.0]])
    loss = bradley_terry(a, b, tensor([[1.0], [0.0]]), margin)
    assert float(loss) == pytest.approx((softplus(1.0) + softplus(3.0)) / 2)


def test_each_pair_gets_its_own_margin() -> None:
    a, b = tensor([[1.0], [1.0]]), tensor([[0.0], [0.0]])
    loss = bradley_terry(a, b, tensor([[1.0], [1.0]]), tensor([[0.0], [5.0]]))
    assert float(loss) == pytest.approx((softplus(-1.0) + softplus(4.0)) / 2)


def test_centring_adds_the_square_of_the_sum() -> None:
    a, b, label = tensor([[2.0]]), tensor([[1.0]]), tensor([[1.0]])
    plain = float(bradley_terry(a, b, label))
    assert float(bradley_terry(a, b, label, centering=0.01)) == pytest.approx(plain + 0.01 * 9.0)


def test_a_missing_label_counts_nowhere() -> None:
    a = tensor([[1.0, 3.0], [50.0, 1.0]], requires_grad=True)
    b = tensor([[0.0, 1.0], [-7.0, 1.0]])
    labels = tensor([[1.0, 1.0], [NAN, 0.0]])
    loss = bradley_terry(a, b, labels, centering=0.1)
    loss.backward()
    first = softplus(-1.0) + 0.1 * 1.0
    second = (softplus(-2.0) + 0.1 * 16.0 + softplus(0.0) + 0.1 * 4.0) / 2
    assert loss.item() == pytest.approx((first + second) / 2)
    assert a.grad is not None
    assert float(a.grad[1, 0]) == 0.0
    assert bool(torch.isfinite(a.grad).all())


def test_a_head_without_any_label_is_left_out_of_the_mean() -> None:
    a, b = tensor([[1.0, 9.0]], requires_grad=True), tensor([[0.0, 0.0]])
    loss = bradley_terry(a, b, tensor([[1.0, NAN]]))
    assert loss.item() == pytest.approx(softplus(-1.0))
    nothing = bradley_terry(a, b, tensor([[NAN, NAN]]))
    nothing.backward()
    assert nothing.item() == 0.0


def test_scores_far_apart_stay_finite() -> None:
    a = tensor([[1e4], [-1e4]], requires_grad=True)
    loss = bradley_terry(a, torch.zeros(2, 1), tensor([[0.0], [1.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert a.grad is not None
    torch.testing.assert_close(a.grad, tensor([[0.5], [-0.5]]))
