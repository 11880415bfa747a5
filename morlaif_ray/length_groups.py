"""Which rows of unequal length go through a model together: little padding, few passes.

Rows of a pass are padded to its longest. Rows sorted by length are cut into passes such that real tokens, padding and
the fixed cost of every pass, counted in tokens, are least together (dynamic programming over the cuts).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

WEIGHT_TRAFFIC_TOKENS = 32
"""What reading the weights, and adding up their gradients, costs in every pass, whatever their size."""
LAUNCH_COST = {"cpu": 1e8, "cuda": 1e12}
"""Starting a pass's kernels, in tokens times weights. CPU: measured with 0.3M to 30M weights; CUDA: a guess."""
MOST_TOKENS = 4096


def pass_overhead_tokens(module: nn.Module) -> int:
    """What one more pass costs beside its tokens, in tokens: much for small models, little for large ones."""
    first = next(module.parameters())
    tables = {id(p) for part in module.modules() if _is_table(part) for p in part.parameters()}
    weights = sum(p.numel() for p in module.parameters() if id(p) not in tables)
    launches = LAUNCH_COST["cuda" if first.device.type == "cuda" else "cpu"] / max(weights, 1)
    return min(MOST_TOKENS, WEIGHT_TRAFFIC_TOKENS + int(launches))


def _is_table(part: nn.Module) -> bool:
    """Embeddings cost no products; an output layer tied to them meets response tokens only."""
    return isinstance(part, nn.Embedding)


def cheapest_groups(
    lengths: Sequence[int], max_rows: int, max_tokens: int | None, overhead_tokens: int
) -> list[list[int]]:
    """Row indices of every group, longest rows first, equal lengths in row order; every row once.

    A group holds at most `max_rows` rows and, with `max_tokens`, at most that many tokens with padding; a longer row is
    a group of its own. `overhead_tokens`: the cost of one more group. Among equals the larger first group wins.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    longest = np.array([lengths[row] for row in order], dtype=np.int64)
    num = len(order)
    cost = np.zeros(num + 1, dtype=np.int64)  # of the rows from here to the end
    size = np.ones(num, dtype=np.int64)
    for start in range(num - 1, -1, -1):
        most = min(max_rows, num - start)
        if max_tokens is not None:
            most = max(1, min(most, max_tokens // max(int(longest[start]), 1)))
        sizes = np.arange(most, 0, -1)
        costs = sizes * longest[start] + overhead_tokens + cost[start + sizes]
        best = int(costs.argmin())
        cost[start], size[start] = costs[best], sizes[best]
    groups, start = [], 0
    while start < num:
        groups.append(order[start : start + int(size[start])])
        start += int(size[start])
    return groups
