"""Bradley-Terry losses on score differences (ALGORITHMS.md section 2). Pure functions of tensors.

Legend: B pairs, H heads. A pair's label is NaN where the judge gave no usable answer: masked, never guessed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    scores_a_BH: Tensor,
    scores_b_BH: Tensor,
    labels_BH: Tensor,
    margins_BH: Tensor | None = None,
    *,
    centering: float = 0.0,
    counts_H: Tensor | None = None,
) -> Tensor:
    """Mean over present (pair, head) of -p*logsig(D - m) - (1-p)*logsig(-D - m), D = r_a - r_b.

    Args: scores [B, H]; labels [B, H] in [0, 1], probability that a is better, NaN = missing; margins [B, H] >= 0 or
    None. `centering` adds c*(r_a + r_b)^2, which fixes the constant that the likelihood leaves free.
    `counts_H` [H]: present pairs per head of the whole batch, where these B are a part of it; the losses of the parts
    then sum to the loss of the whole.
    Returns a scalar: the mean over heads of each head's mean over its present pairs (a head with more labels does not
    outweigh the others). With soft labels and no margin the minimum is D = logit(p) (Bradley and Terry 1952).
    """
    present_BH = ~torch.isnan(labels_BH)
    labels_BH = torch.where(present_BH, labels_BH, torch.zeros_like(labels_BH))
    difference_BH = scores_a_BH - scores_b_BH
    margin = torch.zeros_like(difference_BH) if margins_BH is None else margins_BH
    loss_BH = -labels_BH * F.logsigmoid(difference_BH - margin) - (1 - labels_BH) * F.logsigmoid(
        -difference_BH - margin
    )
    if centering:
        loss_BH = loss_BH + centering * (scores_a_BH + scores_b_BH) ** 2
    if counts_H is None:
        counts_H = present_BH.sum(dim=0)
    per_head_H = (loss_BH * present_BH).sum(dim=0) / counts_H.clamp_min(1)
    heads = (counts_H > 0).sum().clamp_min(1)
    return per_head_H.sum() / heads
