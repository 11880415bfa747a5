"""Batches by length: every row once, within the limits, with little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morlaif_ray.preference.batching import length_batches, padded, padding_waste

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def test_the_shortest_come_first_and_a_batch_ends_at_its_token_limit() -> None:
    # sorted: 2 2 3 | 5 (3 rows of 5 would be 15) 5 | 20 alone, though over the limit
    assert length_batches([5, 2, 20, 2, 5, 3], 64, 10) == [[1, 3, 5], [0, 4], [2]]
    assert length_batches([5, 2, 20, 2, 5, 3], 2) == [[1, 3], [5, 0], [4, 2]]
    assert length_batches([], 4, 10) == []


@given(
    st.lists(st.integers(1, 90), max_size=60),
    st.integers(1, 9),
    st.none() | st.integers(1, 300),
)
def test_every_row_once_within_the_limits(
    lengths: list[int], max_rows: int, max_tokens: int | None
) -> None:
    batches = length_batches(lengths, max_rows, max_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= max_rows
        longest = max(lengths[row] for row in batch)
        assert max_tokens is None or len(batch) == 1 or len(batch) * longest <= max_tokens


def test_waste_by_hand() -> None:
    # 2 x 4 and 1 x 5 tokens computed, 3 + 4 + 5 real
    assert padding_waste([3, 4, 5], [[0, 1], [2]]) == pytest.approx(1 / 13)
    assert padding_waste([], []) == 0.0


def test_padding_stands_on_the_right_whatever_token_it_is() -> None:
    tokens, mask = padded([[7, 9], [9, 9, 8], [1]], 9, "cpu")
    np.testing.assert_array_equal(tokens, [[7, 9, 9], [9, 9, 8], [1, 9, 9]])
    np.testing.assert_array_equal(mask, [[1, 1, 0], [1, 1, 1], [1, 0, 0]])
