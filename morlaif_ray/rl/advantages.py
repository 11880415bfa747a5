"""From rewards to advantages and returns: GAE with a value function, or a baseline from the prompt's other samples.

All three feed the same clipped loss (ALGORITHMS.md section 5). The KL penalty is part of the reward for all of them.
Legend: B responses (n consecutive ones per prompt), T response tokens, P = B/n prompts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from morlaif_ray.rl.functional import gae
from morlaif_ray.tensor_ops import masked_whiten

Estimator = Literal["gae", "rloo", "grpo"]
GROUP_STD_FLOOR = 1e-4
"""Added to a group's standard deviation: a group of equal rewards has advantage 0, not 0/0."""


def rloo(total_B: Tensor, samples_per_prompt: int) -> Tensor:
    """A_i = R_i - mean of the other n - 1 samples of the prompt, [B] (Kool et al. 2019; Ahmadian et al. 2024)."""
    grouped_PN = _grouped(total_B, samples_per_prompt)
    others_PN = (grouped_PN.sum(dim=1, keepdim=True) - grouped_PN) / (samples_per_prompt - 1)
    return (grouped_PN - others_PN).reshape(-1)


def grpo(total_B: Tensor, samples_per_prompt: int) -> Tensor:
    """A_i = (R_i - mean) / (sample standard deviation + 1e-4) over the prompt's n samples, [B] (Shao et al. 2024)."""
    grouped_PN = _grouped(total_B, samples_per_prompt)
    centred_PN = grouped_PN - grouped_PN.mean(dim=1, keepdim=True)
    return (centred_PN / (grouped_PN.std(dim=1, keepdim=True) + GROUP_STD_FLOOR)).reshape(-1)


def estimate_advantages(
    estimator: Estimator,
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    samples_per_prompt: int,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [B, T] and 0 outside the mask.

    gae: whitened over the response tokens of the batch. rloo, grpo: one number per response for all its tokens, from
    the undiscounted sum of its rewards; not whitened again; returns are 0, as nothing learns them.
    """
    if estimator == "gae":
        advantages, returns = gae(rewards_BT, values_BT, mask_BT, gamma, lam)
        return masked_whiten(advantages, mask_BT), returns
    total_B = (rewards_BT * mask_BT).sum(dim=1)
    group = rloo if estimator == "rloo" else grpo
    advantage_B = group(total_B, samples_per_prompt)
    return advantage_B.unsqueeze(1) * mask_BT, torch.zeros_like(rewards_BT)


def _grouped(total_B: Tensor, samples_per_prompt: int) -> Tensor:
    if samples_per_prompt < 2 or len(total_B) % samples_per_prompt:
        raise ValueError(
            f"{len(total_B)} responses are no groups of {samples_per_prompt}: a group needs at least 2 samples of "
            f"one prompt, and the batch whole groups"
        )
    return total_B.reshape(-1, samples_per_prompt)
