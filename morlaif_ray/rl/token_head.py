"""Log-probabilities of tokens from the states before them, without keeping a [N, V] tensor where that is asked for.

Only states of real response tokens come here, flat: no padding meets the vocabulary.
Legend: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from morlaif_ray.cpu_products import preferred_rows


@dataclass(frozen=True)
class HeadSettings:
    """How states become log-probabilities."""

    temperature: float = 1.0
    softcap: float | None = None
    """logits = softcap * tanh(logits / softcap) before the temperature (Gemma 2)."""
    chunk_tokens: int | None = None
    """Tokens whose logits exist at once; None: all, and their log-softmax is kept for the gradient."""


def head_logprobs(
    states_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    how: HeadSettings,
    with_entropies: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log softmax(states @ weight' + bias)[token], entropy of each distribution) in nats, float32 [N] each.

    The log-probabilities are differentiable once; the entropies, zeros unless asked for, are not. With `chunk_tokens`
    the logits are computed once more for the gradient, a chunk at a time (as in Liger Kernel, Hsu et al. 2024, and Cut
    Cross-Entropy, Wijmans et al. 2024): a third more products, no [N, V] tensor.
    """
    if torch.is_autocast_enabled(states_ND.device.type):
        dtype = torch.get_autocast_dtype(states_ND.device.type)
        states_ND, weight_VD = states_ND.to(dtype), weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    num = len(tokens_N)
    more = preferred_rows(num) - num
    if more:  # tokens that nobody reads: their gradient is zero
        states_ND, tokens_N = pad(states_ND, (0, 0, 0, more)), pad(tokens_N, (0, more))
    logprobs_N, entropies_N = _HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        states_ND, weight_VD, bias_V, tokens_N, how, with_entropies, torch.is_grad_enabled()
    )
    return logprobs_N[:num], entropies_N[:num]


class _HeadLogprobs(torch.autograd.Function):
    """d logp / d logits = onehot - softmax, so the gradient needs one [n, V] buffer, overwritten in place."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        tokens_N: Tensor,
        how: HeadSettings,
        with_entropies: bool,
        recording: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = states_ND.new_zeros(len(tokens_N), dtype=torch.float32)
        entropies = torch.zeros_like(logprobs)
        logsoft: Tensor | None = None
        for part in _chunks(len(tokens_N), how):
            logsoft = torch.log_softmax(_logits(states_ND[part], weight_VD, bias_V, how), dim=-1)
            logprobs[part] = logsoft.gather(1, tokens_N[part].unsqueeze(1)).squeeze(1)
            if with_entropies:
                entropies[part] = -(logsoft.exp().mul_(logsoft)).sum(dim=1)
        keep = recording and how.chunk_tokens is None and how.softcap is None
        ctx.how = how
        ctx.save_for_backward(states_ND, weight_VD, bias_V, tokens_N, logsoft if keep else None)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states_ND, weight_VD, bias_V, tokens_N, kept = ctx.saved_tensors
        how: HeadSettings = ctx.how
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_states = torch.empty_like(states_ND) if wants_states else None
        no_tokens = wants_weight and not len(tokens_N)
        d_weight: Tensor | None = torch.zeros_like(weight_VD) if no_tokens else None
        d_bias = torch.zeros_like(bias_V) if wants_bias else None
        scale_N1 = (-gradient_N / how.temperature).unsqueeze(1)
        for part in _chunks(len(tokens_N), how):
            slopes = _minus_slopes(
                kept, states_ND[part], weight_VD, bias_V, tokens_N[part], how
            ).to(weight_VD.dtype)
            # The tokens' own gradients scale the narrow factor of each product, not the [n, V] one.
            scale = scale_N1[part]
            if d_states is not None:
                d_states[part] = linear(slopes, weight_VD.t()).mul_(scale)
            if wants_weight:
                scaled_ND = (states_ND[part] * scale).to(weight_VD.dtype)
                of_part = torch.mm(slopes.t(), scaled_ND)
                d_weight = of_part if d_weight is None else d_weight.add_(of_part)
            if d_bias is not None:
                d_bias += torch.mv(slopes.t(), scale.squeeze(1).to(weight_VD.dtype))
        return d_states, d_weight, d_bias, None, None, None, None


def _minus_slopes(
    kept: Tensor | None,
    states_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    how: HeadSettings,
) -> Tensor:
    """[n, V], -temperature * d logp / d logits (before cap and temperature); overwrites `kept`."""
    slope: Tensor | None = None
    if kept is None:
        logits = _logits(states_ND, weight_VD, bias_V, how)
        if how.softcap is not None:  # d cap*tanh(x/cap) / dx = 1 - tanh^2
            slope = 1.0 - (logits * (how.temperature / how.softcap)) ** 2
        kept = torch.log_softmax(logits, dim=-1)
    made = kept.exp_()
    made[torch.arange(len(tokens_N), device=made.device), tokens_N] -= 1.0
    return made if slope is None else made.mul_(slope)


def _logits(
    states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, how: HeadSettings
) -> Tensor:
    """float32 whatever the weights' dtype: a log-sum-exp near 10 has steps of 0.06 in bfloat16."""
    logits = linear(states_ND, weight_VD, bias_V).float()
    if how.softcap is not None:
        logits = logits.div_(how.softcap).tanh_().mul_(how.softcap)
    return logits if how.temperature == 1.0 else logits.div_(how.temperature)


def _chunks(num: int, how: HeadSettings) -> list[slice]:
    size = how.chunk_tokens or max(num, 1)
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]
