"""Batches of texts of similar length: what is padded is computed for nothing.

Legend: B texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def length_batches(
    lengths: Sequence[int], max_rows: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Row indices of each batch, shortest texts first; every row once, equal lengths in row order.

    A batch holds at most `max_rows` rows and, where `max_tokens` is given, at most that many tokens with its padding.
    A text longer than `max_tokens` is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    batches: list[list[int]] = []
    current: list[int] = []
    for row in order:
        too_wide = max_tokens is not None and (len(current) + 1) * lengths[row] > max_tokens
        if current and (len(current) == max_rows or too_wide):
            batches.append(current)
            current = []
        current.append(row)
    return [*batches, current] if current else batches


def padding_waste(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the computed tokens that are padding, in [0, 1); 0 without batches."""
    computed = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    real = sum(lengths[row] for batch in batches for row in batch)
    return 1.0 - real / computed if computed else 0.0


def padded(ids: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """(tokens [B, L], mask [B, L]) of token id lists, padded on the right; mask 1 = a real token."""
    lengths_B = np.array([len(row) for row in ids])
    mask_BL = np.arange(lengths_B.max())[None, :] < lengths_B[:, None]
    tokens_BL = np.full(mask_BL.shape, pad, dtype=np.int64)
    tokens_BL[mask_BL] = np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])
    return (
        torch.from_numpy(tokens_BL).to(device),
        torch.from_numpy(mask_BL.astype(np.int64)).to(device),
    )
