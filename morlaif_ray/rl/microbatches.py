"""Which rows go through the model together: equal work for every rank, little padding, bounded memory.

Rows are right-padded to the longest of their micro-batch, so rows of like length belong together. Everything here is a
pure function of the lengths: all ranks compute the same plan, and a resumed run the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MicrobatchLimits:
    """What one micro-batch may hold."""

    max_rows: int
    max_tokens: int | None = None
    """Rows times the longest row's tokens (padding counts); a single longer row is a micro-batch of its own."""
    worthwhile_tokens: int = 256
    """Padding that costs more than starting another forward and backward pass."""


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
    return [_cut([(index, lengths[index]) for index in share], limits) for share in shares]


def _cut(rows: Sequence[tuple[int, int]], limits: MicrobatchLimits) -> list[list[int]]:
    """Cuts rows that are sorted by length where a limit or the padding so far asks for it."""
    parts: list[list[int]] = []
    longest = padding = 0
    for index, length in rows:
        full = parts and (
            len(parts[-1]) >= limits.max_rows
            or (
                limits.max_tokens is not None and (len(parts[-1]) + 1) * longest > limits.max_tokens
            )
            or padding + longest - length > limits.worthwhile_tokens
        )
        if full or not parts:
            parts.append([])
            longest, padding = length, 0
        parts[-1].append(index)
        padding += longest - length
    return parts


def fits_at_once(
    lengths: Sequence[int], parts: Sequence[Sequence[int]], limits: MicrobatchLimits
) -> bool:
    """True where all the parts together stay within what a single micro-batch may hold."""
    num_rows = sum(len(part) for part in parts)
    num_tokens = sum(len(part) * max(lengths[index] for index in part) for part in parts)
    return num_rows <= limits.max_rows and (
        limits.max_tokens is None or num_tokens <= limits.max_tokens
    )
