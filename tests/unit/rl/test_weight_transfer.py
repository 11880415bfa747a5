"""Weights in buckets: all of them arrive, in order, and a damaged or foreign bucket does not pass."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from morlaif_ray.errors import NumericalError
from morlaif_ray.rl.weight_transfer import checksum_of, in_buckets

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

WEIGHTS = {
    "a": np.arange(4, dtype=np.float32),  # 16 bytes
    "b": np.ones((2, 3), dtype=np.float32),  # 24
    "c": np.zeros(20, dtype=np.float32),  # 80: more than a bucket holds
    "d": np.array(2.0, dtype=np.float32),  # 4
}


def test_buckets_hold_all_weights_in_order_within_their_size() -> None:
    buckets = list(in_buckets(WEIGHTS, version=3, max_bytes=40))
    assert [list(bucket.weights) for bucket in buckets] == [["a", "b"], ["c"], ["d"]]
    assert [bucket.index for bucket in buckets] == [0, 1, 2]
    assert [bucket.is_last for bucket in buckets] == [False, False, True]
    assert {bucket.version for bucket in buckets} == {3}
    for index, bucket in enumerate(buckets):
        assert bucket.verified(3, index) is bucket


def test_one_bucket_where_all_fit() -> None:
    (bucket,) = in_buckets(WEIGHTS, version=0, max_bytes=1000)
    assert bucket.is_last
    assert list(bucket.weights) == list(WEIGHTS)


def test_a_changed_bit_does_not_pass() -> None:
    (bucket,) = in_buckets({"a": WEIGHTS["a"].copy()}, version=2, max_bytes=100)
    bucket.weights["a"].view(np.uint8)[5] ^= 1
    with pytest.raises(NumericalError, match="bucket 0 of version 2 does not match its checksum"):
        bucket.verified(2, 0)


def test_a_bucket_of_another_version_or_place_does_not_pass() -> None:
    first, second = list(in_buckets(WEIGHTS, version=4, max_bytes=100))[:2]
    with pytest.raises(
        NumericalError, match="got bucket 0 of version 4, expected bucket 0 of version 5"
    ):
        first.verified(5, 0)
    with pytest.raises(NumericalError, match="got bucket 1 of version 4, expected bucket 0"):
        dataclasses.replace(second).verified(4, 0)


def test_the_checksum_sees_names_shapes_and_types() -> None:
    array = np.zeros(4, dtype=np.float32)
    sums = {
        checksum_of({"a": array}),
        checksum_of({"b": array}),
        checksum_of({"a": array.reshape(2, 2)}),
        checksum_of({"a": array.view(np.int32)}),
        checksum_of({"a": np.asfortranarray(np.arange(4.0).reshape(2, 2))}),
    }
    assert len(sums) == 5
    square = np.arange(4.0).reshape(2, 2)
    assert checksum_of({"a": square}) == checksum_of({"a": np.asfortranarray(square)})
