"""Policy weights on their way from the learner to the rollout workers: size-capped buckets with checksums.

A bucket is one object of the store, so no process ever needs a contiguous copy of the whole model, and what arrives is
held against the checksum that the learner computed before an engine sees it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from morlaif_ray.errors import NumericalError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class WeightBucket:
    """Some of the policy's weights. Produced by the learner, consumed by every rollout worker."""

    version: int
    """Number of learner steps behind these weights."""
    index: int
    is_last: bool
    weights: dict[str, Array]
    """Plain parameter name -> array, read-only where it lies in shared memory; or parts of adapters (`base`)."""
    checksum: int
    """CRC-32 of names, shapes, types and bytes."""
    base: int | None = None
    """Checksum of the weights that these are adapters of (`adapter_transfer`); None: these are the weights."""

    def verified(self, version: int, index: int) -> WeightBucket:
        """Itself; NumericalError where it is not bucket `index` of `version` or its bytes changed on the way."""
        if (self.version, self.index) != (version, index):
            raise NumericalError(
                f"weight refresh: got bucket {self.index} of version {self.version}, expected bucket {index} of "
                f"version {version}"
            )
        if checksum_of(self.weights) != self.checksum:
            raise NumericalError(
                f"weight refresh: bucket {index} of version {version} does not match its checksum; the object store "
                f"or the network damaged it; run the same command again"
            )
        return self


def checksum_of(weights: Mapping[str, Array]) -> int:
    """CRC-32 over the weights in their order."""
    checksum = 0
    for name, array in weights.items():
        checksum = add_to_checksum(checksum, name, array)
    return checksum


def add_to_checksum(checksum: int, name: str, array: Array) -> int:
    """The CRC-32 so far, with one more array."""
    checksum = zlib.crc32(f"{name}{array.shape}{array.dtype}".encode(), checksum)
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, checksum)


def in_buckets(
    weights: Mapping[str, Array], version: int, max_bytes: int, base: int | None = None
) -> Iterator[WeightBucket]:
    """The weights in their order, at most `max_bytes` to a bucket (a larger array has one of its own).

    `base`: where they are packed adapters, the checksum of the weights that they belong to.
    """
    groups: list[dict[str, Array]] = [{}]
    size = 0
    for name, array in weights.items():
        if groups[-1] and size + array.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = array
        size += array.nbytes
    for index, group in enumerate(groups):
        is_last = index == len(groups) - 1
        yield WeightBucket(version, index, is_last, group, checksum_of(group), base)
