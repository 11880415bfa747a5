"""Which rows go through the model together: equal work for every rank, little padding, bounded memory.

Rows are right-padded to the longest of their micro-batch, so rows of like length belong together; where the model packs
them there is no padding, and micro-batches are as large as they may be. Everything here is a pure function of the
lengths: all ranks compute the same plan, and a resumed run the same bits.
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
    padded: bool = True
    """False: rows lie one behind another, and a micro-batch has the tokens of its rows."""

    def num_tokens(self, lengths: Sequence[int]) -> int:
        """Tokens of a micro-batch of rows of these lengths."""
        return len(lengths) * max(lengths) if self.padded else sum(lengths)


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
    if not limits.padded:
        return _as_large_as_allowed(share, lengths, limits)
    own = [lengths[index] for index in share]
    groups = cheapest_groups(own, limits.max_rows, limits.max_tokens, limits.overhead_tokens)
    return [[share[place] for place in group] for group in groups]


def _as_large_as_allowed(
    share: Sequence[int], lengths: Sequence[int], limits: MicrobatchLimits
) -> list[list[int]]:
    parts: list[list[int]] = []
    for index in share:
        if parts and _within([lengths[i] for i in (*parts[-1], index)], limits):
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def _within(lengths: Sequence[int], limits: MicrobatchLimits) -> bool:
    few = limits.max_tokens is None or limits.num_tokens(lengths) <= limits.max_tokens
    return len(lengths) <= limits.max_rows and few


def num_at_once(
    lengths: Sequence[int], parts: Sequence[Sequence[int]], limits: MicrobatchLimits
) -> int:
    """How many of the parts, from the first on, together stay within what a single micro-batch may hold."""
    num_rows = num_tokens = 0
    for number, part in enumerate(parts):
        num_rows += len(part)
        num_tokens += limits.num_tokens([lengths[index] for index in part])
        too_many = limits.max_tokens is not None and num_tokens > limits.max_tokens
        if num_rows > limits.max_rows or too_many:
            return number
    return len(parts)
