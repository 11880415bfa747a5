"""Several servers of one model: which is asked for a question, and which next when it cannot be reached.

Contract: the order depends on question and endpoints alone, not on the order of asking, so a run that is repeated asks
the same server again (its prefix cache is warm). Weighted rendezvous hashing: taking one server away moves only its own
questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from morlaif_ray.seeding import unit_interval

COOL_S = 30.0
"""A server that could not be reached is asked last for so long."""


def endpoint_order(
    content: str, urls: Sequence[str], weights: Sequence[float], seed: int
) -> list[int]:
    """Indices of the endpoints, the chosen one first; endpoint i is first with probability weight_i / sum."""

    def arrival(index: int) -> float:
        # Exponential clocks with the weights as rates: the first to ring is the weighted choice.
        uniform = unit_interval(seed, "endpoint", urls[index], content)
        return -math.log(1.0 - uniform) / weights[index]

    return sorted(range(len(urls)), key=arrival)


def cooled_last(order: Sequence[int], down_until_s: Sequence[float], now_s: float) -> list[int]:
    """The same order with the servers that were down a moment ago at its end."""
    return sorted(order, key=lambda index: down_until_s[index] > now_s)
