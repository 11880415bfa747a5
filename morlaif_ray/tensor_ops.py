"""Small tensor functions shared by PPO and preference models.

Legend: B batch, L sequence tokens, T response tokens, V vocabulary, D width. Masks are bool, True = counts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True entries of `mask` (same shape); 0 where none is True."""
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp_min(1.0)


def masked_whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Shifts and scales to mean 0, variance 1 over the True entries (population variance); False entries become 0."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return (values - mean) * torch.rsqrt(variance + eps) * mask.to(values.dtype)


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Log-probability (nats) of each token: logit minus log-sum-exp, so no [B, T, V] log-softmax is kept.

    In float32 whatever the logits' dtype: a log-sum-exp near 10 has steps of 0.06 in bfloat16.
    """
    chosen = logits_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)
    return chosen.float() - torch.logsumexp(logits_BTV.float(), dim=-1)


def entropy(logits_BTV: Tensor) -> Tensor:
    """Entropy (nats) of each distribution, [B, T]."""
    logprobs = torch.log_softmax(logits_BTV.float(), dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def response_positions(prompt_lengths_B: Tensor, num_tokens: int) -> Tensor:
    """Index into the sequence of the state before each response token: prompt_length - 1 + t, shape [B, T].

    The logits at that index predict response token t, the value there is V_t.
    """
    steps_T = torch.arange(num_tokens, device=prompt_lengths_B.device)
    return prompt_lengths_B.unsqueeze(1) - 1 + steps_T.unsqueeze(0)


def take_positions(hidden_BLD: Tensor, positions_BT: Tensor) -> Tensor:
    """Rows of `hidden_BLD` at `positions_BT` (clamped to the sequence), shape [B, T, D]."""
    index = positions_BT.clamp(max=hidden_BLD.shape[1] - 1).unsqueeze(-1)
    return hidden_BLD.gather(1, index.expand(-1, -1, hidden_BLD.shape[2]))


def last_true_index(mask_BL: Tensor) -> Tensor:
    """Index of the last True per row, whatever stands at the padding (pad may equal eos), shape [B]."""
    length = mask_BL.shape[1]
    steps = torch.arange(length, device=mask_BL.device)
    return (mask_BL.long() * (steps + 1)).argmax(dim=1)
