"""Which rows go together: nothing lost, limits kept, ranks equal."""

from __future__ import annotations

import numpy as np
import pytest

from morlaif_ray.rl.microbatches import MicrobatchLimits, num_at_once, plan_microbatches

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def test_rows_of_like_length_go_together() -> None:
    # Longest first: 50 50 49 | 10 9: one more row of 10 would be padded by 40
    limits = MicrobatchLimits(max_rows=64, overhead_tokens=30)
    assert plan_microbatches([10, 50, 9, 50, 49], 1, limits) == [[[1, 3, 4], [0, 2]]]


def test_padding_that_is_cheaper_than_another_pass_stays() -> None:
    limits = MicrobatchLimits(max_rows=64, overhead_tokens=1000)
    assert plan_microbatches([10, 50, 9, 50, 49], 1, limits) == [[[1, 3, 4, 0, 2]]]


def test_the_token_budget_counts_padding() -> None:
    limits = MicrobatchLimits(max_rows=64, max_tokens=20, overhead_tokens=1000)
    # 2 x 10 = 20; then 8 alone with 7: 16, a third would make 24
    assert plan_microbatches([10, 10, 8, 7, 6], 1, limits) == [[[0, 1], [2, 3], [4]]]


def test_a_row_longer_than_the_budget_is_alone() -> None:
    limits = MicrobatchLimits(max_rows=64, max_tokens=20)
    assert plan_microbatches([30, 5, 5], 1, limits) == [[[0], [1, 2]]]


def test_ranks_get_their_rows_there_and_back() -> None:
    limits = MicrobatchLimits(max_rows=64)
    assert plan_microbatches([8, 7, 6, 5, 4], 2, limits) == [[[0, 3, 4]], [[1, 2]]]


def test_a_rank_without_rows_has_no_microbatch() -> None:
    assert plan_microbatches([3], 3, MicrobatchLimits(max_rows=2)) == [[[0]], [], []]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [None, 200])
def test_every_row_is_in_exactly_one_microbatch_and_ranks_differ_by_less_than_a_row(
    num_ranks: int, max_tokens: int | None
) -> None:
    lengths = np.random.default_rng(0).integers(5, 90, 64).tolist()
    limits = MicrobatchLimits(max_rows=6, max_tokens=max_tokens)
    plan = plan_microbatches(lengths, num_ranks, limits)
    rows = [row for parts in plan for part in parts for row in part]
    assert sorted(rows) == list(range(64))
    for part in (part for parts in plan for part in parts):
        assert len(part) <= 6
        size = len(part) * max(lengths[row] for row in part)
        assert max_tokens is None or size <= max_tokens
    tokens = [sum(lengths[row] for part in parts for row in part) for parts in plan]
    assert max(tokens) - min(tokens) < max(lengths)


def test_as_many_parts_are_kept_as_one_microbatch_may_hold() -> None:
    lengths, parts = [10, 10, 4], [[0, 1], [2]]
    for limits, expected in (
        (MicrobatchLimits(max_rows=3), 2),
        (MicrobatchLimits(max_rows=2), 1),
        (MicrobatchLimits(max_rows=1), 0),
        (MicrobatchLimits(max_rows=3, max_tokens=24), 2),
        (MicrobatchLimits(max_rows=3, max_tokens=23), 1),
        (MicrobatchLimits(max_rows=3, max_tokens=19), 0),
    ):
        assert num_at_once(lengths, parts, limits) == expected


def test_without_padding_a_microbatch_is_as_large_as_it_may_be() -> None:
    # Longest first: 50 50 49 10 9
    lengths = [10, 50, 9, 50, 49]
    for rows, tokens, expected in (
        (64, None, [[1, 3, 4, 0, 2]]),
        (2, None, [[1, 3], [4, 0], [2]]),
        (64, 109, [[1, 3], [4, 0, 2]]),
        (64, 49, [[1], [3], [4], [0, 2]]),
    ):
        limits = MicrobatchLimits(rows, tokens, overhead_tokens=1, padded=False)
        assert plan_microbatches(lengths, 1, limits) == [expected]
    assert num_at_once([9, 3, 4], [[0, 1], [2]], MicrobatchLimits(3, 16, padded=False)) == 2
