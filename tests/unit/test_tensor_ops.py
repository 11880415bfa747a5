"""Small tensor functions by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from morlaif_ray.tensor_ops import (
    entropy,
    last_true_index,
    masked_mean,
    masked_whiten,
    response_positions,
    take_positions,
    token_logprobs,
)

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

MASK = tensor([[True, True], [True, False]])


def test_a_masked_mean_counts_true_entries_only() -> None:
    assert float(masked_mean(tensor([[1.0, 2.0], [6.0, 99.0]]), MASK)) == pytest.approx(3.0)
    assert float(masked_mean(tensor([5.0]), tensor([False]))) == 0.0


def test_whitening_gives_mean_zero_and_population_variance_one() -> None:
    # 1, 2, 6: mean 3, population variance (4 + 1 + 9)/3 = 14/3
    white = masked_whiten(tensor([[1.0, 2.0], [6.0, 99.0]]), MASK)
    std = math.sqrt(14 / 3)
    torch.testing.assert_close(white, tensor([[-2 / std, -1 / std], [3 / std, 0.0]]))


def test_whitening_of_equal_values_is_zero() -> None:
    torch.testing.assert_close(masked_whiten(torch.full((2, 2), 7.0), MASK), torch.zeros(2, 2))


def test_token_logprobs_are_those_of_the_log_softmax() -> None:
    # logits log(1), log(2), log(5): probabilities 1/8, 2/8, 5/8
    logits = tensor([[[1.0, 2.0, 5.0]] * 2]).log()
    expected = tensor([[math.log(5 / 8), math.log(1 / 8)]])
    torch.testing.assert_close(token_logprobs(logits, tensor([[2, 0]])), expected)


def test_token_logprobs_of_half_precision_logits_are_computed_in_full() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 1000).bfloat16(), torch.randint(0, 1000, (2, 5))
    exact = torch.log_softmax(logits.double(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    got = token_logprobs(logits, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)


def test_entropy_of_a_fair_and_of_a_loaded_coin() -> None:
    loaded = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    made = entropy(tensor([[[0.0, 0.0], [math.log(9.0), 0.0]]]))
    torch.testing.assert_close(made, tensor([[math.log(2), loaded]]))


def test_the_state_before_each_response_token() -> None:
    assert response_positions(tensor([3, 1]), 3).tolist() == [[2, 3, 4], [0, 1, 2]]


def test_taken_positions_stay_within_the_sequence() -> None:
    hidden = torch.arange(8.0).reshape(1, 4, 2)
    taken = take_positions(hidden, tensor([[0, 3, 9]]))
    assert taken.tolist() == [[[0.0, 1.0], [6.0, 7.0], [6.0, 7.0]]]


def test_the_last_true_index_whatever_lies_before_it() -> None:
    mask = tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    assert last_true_index(mask).tolist() == [1, 3, 2, 2, 0]
