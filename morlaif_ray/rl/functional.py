"""The arithmetic of PPO as pure functions (Schulman et al. 2017; Ziegler et al. 2019; ALGORITHMS.md section 5).

Legend: B responses, T response tokens. All [B, T] arrays are aligned: entry t belongs to the t-th response token; the
mask is True for real response tokens (EOS included). Nats throughout.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from morlaif_ray.tensor_ops import masked_mean


def kl_penalty(
    logprobs_BT: Tensor, ref_logprobs_BT: Tensor, estimator: Literal["k1", "k3"] = "k1"
) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the sampled token, [B, T].

    k1 = log p - log q (unbiased, any sign); k3 = exp(log q - log p) - 1 - (log q - log p) (unbiased, never negative,
    lower variance). Source: Schulman 2020, "Approximating KL divergence".
    """
    difference = logprobs_BT - ref_logprobs_BT
    if estimator == "k1":
        return difference
    return torch.exp(-difference) - 1.0 + difference


def place_rewards(kl_BT: Tensor, mask_BT: Tensor, score_B: Tensor, kl_coefficient: float) -> Tensor:
    """r_t = -beta * kl_t, plus the response's score at its last token, [B, T]; 0 outside the mask."""
    rewards_BT = -kl_coefficient * kl_BT * mask_BT
    last_B = mask_BT.long().sum(dim=1) - 1
    rows = torch.arange(len(score_B), device=score_B.device)
    rewards_BT[rows, last_B] = rewards_BT[rows, last_B] + score_B
    return rewards_BT


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016). Returns (advantages, returns), each [B, T].

    delta_t = r_t + gamma*V_{t+1} - V_t; A_t = delta_t + gamma*lambda*A_{t+1}; the value after the last response token
    is 0. Both results are 0 outside the mask.
    """
    mask = mask_BT.to(rewards_BT.dtype)
    values = values_BT * mask  # so that V after the last token is 0
    num_tokens = rewards_BT.shape[1]
    advantages = torch.zeros_like(rewards_BT)
    running = torch.zeros_like(rewards_BT[:, 0])
    following = torch.zeros_like(running)
    for t in reversed(range(num_tokens)):
        delta = rewards_BT[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        following = values[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def ppo_policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_range: float,
    denominator: Tensor | None = None,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, w*max(-A*ratio, -A*clip(ratio, 1-e, 1+e)), averaged over response tokens.

    `weights_BT`: importance weights w, constants; None: 1. `denominator`: number of response tokens of the whole
    minibatch when this is one of its micro-batches; None: this batch's own. Metrics: `approx_kl` (k3 of old to new),
    `clipfrac` - means over this batch's tokens.
    """
    mask = mask_BT.to(logprobs_BT.dtype)
    log_ratio = (logprobs_BT - old_logprobs_BT) * mask
    ratio = log_ratio.exp()
    unclipped = -advantages_BT * ratio
    clipped = -advantages_BT * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    worst = torch.maximum(unclipped, clipped) * mask
    total = (worst if weights_BT is None else worst * weights_BT).sum()
    loss = total / (mask.sum().clamp_min(1.0) if denominator is None else denominator)
    with torch.no_grad():
        metrics = {
            "approx_kl": masked_mean(ratio - 1.0 - log_ratio, mask_BT),
            "clipfrac": masked_mean((clipped > unclipped).to(mask.dtype), mask_BT),
        }
    return loss, metrics


def truncated_importance(
    old_logprobs_BT: Tensor, engine_logprobs_BT: Tensor, mask_BT: Tensor, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """min(exp(log p_learner - log p_engine), cap) per token, 0 outside the mask; constants, [B, T].

    Corrects for samples that another distribution drew: an engine with other arithmetic, or weights of an earlier step
    (truncated importance sampling, Ionides 2008; Yao et al. 2025 for engine mismatch). Metrics: mean weight, and share
    of tokens whose weight met the cap.
    """
    ratio = (old_logprobs_BT - engine_logprobs_BT).detach().exp()
    weights = ratio.clamp(max=cap) * mask_BT
    metrics = {
        "importance_weight_mean": masked_mean(weights, mask_BT),
        "importance_truncated_share": masked_mean((ratio > cap).to(weights.dtype), mask_BT),
    }
    return weights, metrics


def ppo_value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    clip_range: float,
    denominator: Tensor | None = None,
) -> Tensor:
    """0.5 * max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2), averaged like the policy loss."""
    mask = mask_BT.to(values_BT.dtype)
    clipped = old_values_BT + (values_BT - old_values_BT).clamp(-clip_range, clip_range)
    worst = torch.maximum((values_BT - returns_BT) ** 2, (clipped - returns_BT) ** 2)
    total = 0.5 * (worst * mask).sum()
    return total / (mask.sum().clamp_min(1.0) if denominator is None else denominator)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - Var(R - V)/Var(R) over the response tokens; NaN where the returns do not vary."""
    returns = returns_BT[mask_BT]
    variance = returns.var(unbiased=False)
    if float(variance) == 0.0:
        return float("nan")
    return float(1.0 - (returns - values_BT[mask_BT]).var(unbiased=False) / variance)
