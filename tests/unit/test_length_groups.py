"""Cuts of sorted rows: the cheapest of all, limits kept, and overheads that follow the model's size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from morlaif_ray.length_groups import (
    MOST_TOKENS,
    WEIGHT_TRAFFIC_TOKENS,
    cheapest_groups,
    pass_overhead_tokens,
)

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def cost(lengths: list[int], groups: list[list[int]], overhead: int) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + overhead for group in groups)


@pytest.mark.parametrize("overhead", [0, 3, 12, 1000])
@pytest.mark.parametrize("max_tokens", [None, 24])
def test_no_cut_of_the_sorted_rows_is_cheaper(overhead: int, max_tokens: int | None) -> None:
    rng = np.random.default_rng(overhead)
    for _ in range(5):
        lengths = rng.integers(1, 20, 9).tolist()
        groups = cheapest_groups(lengths, 4, max_tokens, overhead)
        order = sorted(range(9), key=lambda row: -lengths[row])
        costs = []
        for cuts in itertools.product([False, True], repeat=8):
            parts: list[list[int]] = [[order[0]]]
            for row, cut in zip(order[1:], cuts, strict=True):
                parts = [*parts, [row]] if cut else [*parts[:-1], [*parts[-1], row]]
            sizes = [len(part) * max(lengths[row] for row in part) for part in parts]
            if all(
                len(part) == 1 or (len(part) <= 4 and (max_tokens is None or size <= max_tokens))
                for part, size in zip(parts, sizes, strict=True)
            ):
                costs.append(cost(lengths, parts, overhead))
        assert cost(lengths, groups, overhead) == min(costs)
        assert sorted(itertools.chain(*groups)) == list(range(9))


def test_longest_first_and_equal_lengths_in_row_order() -> None:
    assert cheapest_groups([5, 7, 5, 7, 5], 2, None, 1) == [[1, 3], [0, 2], [4]]
    assert cheapest_groups([], 2, None, 1) == []


def test_a_pass_of_a_large_model_costs_few_tokens_and_embeddings_do_not_count() -> None:
    small, large = torch.nn.Linear(400, 1000), torch.nn.Linear(4000, 5000)
    table = torch.nn.Embedding(10_000, 400)
    assert pass_overhead_tokens(small) == pass_overhead_tokens(torch.nn.Sequential(table, small))
    assert pass_overhead_tokens(small) > 2 * pass_overhead_tokens(large) > WEIGHT_TRAFFIC_TOKENS
    assert pass_overhead_tokens(torch.nn.Linear(2, 2)) == MOST_TOKENS
