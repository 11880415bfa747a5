"""Which rows go through the model together: equal work for every rank, little padding, bounded memory.

Rows are right-padded to the longest of their micro-batch, so rows of like length belong together. Everything here is a
pure function of the lengths: all ranks compute the same plan, and a resumed run the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from morlaif_ray.length_groups import cheapest_groups


@dataclass(frozen=True)
class MicrobatchLimits:
    """What one micro-batch may hold."""

    max_rows: int
    max_tokens: int | None = None
    """Rows times the longest row's tokens (padding counts); a single longer row is a micro-batch of its own."""
    overhead_tokens: int = 256
    """What starting another forward and backward pass costs, in tokens (`length_groups.pass_overhead_tokens`)."""


def plan_microbatches(
    lengths: Sequence[int], num_ranks: int, limits: MicrobatchLimits
) -> list[list[list[int]]]:
    """For each rank its micro-batches, each a list of indices into `lengths` (longest rows first).

    Longest first, every row goes to the next rank, there and back again (0 1 1 0 0 1 ...), so the ranks' tokens differ
    by less than one row. A rank gets no micro-batch where there are fewer rows than ranks.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for position, index in enumerate(order):
        lap, place = divmod(position, num_ranks)
        shares[place if lap % 2 == 0 else num_ranks - 1 - place].append(index)
    return [_cut(share, lengths, limits) for share in shares]


def _cut(share: Sequence[int], lengths: Sequence[int], limits: MicrobatchLimits) -> list[list[int]]:
    own = [lengths[index] for index in share]
    groups = cheapest_groups(own, limits.max_rows, limits.max_tokens, limits.overhead_tokens)
    return [[share[place] for place in group] for group in groups]


def fits_at_once(
    lengths: Sequence[int], parts: Sequence[Sequence[int]], limits: MicrobatchLimits
) -> bool:
    """True where all the parts together stay within what a single micro-batch may hold."""
    num_rows = sum(len(part) for part in parts)
    num_tokens = sum(len(part) * max(lengths[index] for index in part) for part in parts)
    return num_rows <= limits.max_rows and (
        limits.max_tokens is None or num_tokens <= limits.max_tokens
    )
