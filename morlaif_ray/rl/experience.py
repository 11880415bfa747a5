"""What a PPO step knows of its rollouts, and the pure step from rewards to what the epochs learn from.

Legend: B responses, T response tokens. All [B, T] tensors are float32 and 0 outside the mask. Nats throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.rl.advantages import estimate_advantages
from morlaif_ray.rl.functional import kl_penalty, place_rewards, truncated_importance
from morlaif_ray.rl.policy_model import TokenBatch
from morlaif_ray.types import RolloutBatch


@dataclass(frozen=True)
class Evaluation:
    """The batch under the policy as it is when the step begins, and under the reference."""

    logprobs_BT: Tensor
    values_BT: Tensor
    entropies_BT: Tensor
    ref_logprobs_BT: Tensor


@dataclass(frozen=True)
class Experience:
    """Everything that stays fixed during the epochs of one step."""

    tokens: TokenBatch
    lengths: tuple[int, ...]
    """Tokens of each row, prompt and response."""
    old: Evaluation
    advantages_BT: Tensor
    returns_BT: Tensor
    weights_BT: Tensor | None
    """Truncated importance weights; None: 1."""


def to_tokens(batch: RolloutBatch, device: str) -> TokenBatch:
    """The batch as tensors. Copies: the arrays of a remote batch are read-only views of shared memory."""
    tokens = TokenBatch.from_lengths(
        torch.from_numpy(np.array(batch.tokens_BL)),
        torch.from_numpy(np.array(batch.prompt_lengths_B)),
        torch.from_numpy(np.array(batch.response_lengths_B)),
    )
    return TokenBatch(**{f.name: getattr(tokens, f.name).to(device) for f in fields(tokens)})


def row_lengths(batch: RolloutBatch) -> tuple[int, ...]:
    """Tokens of each row, prompt and response."""
    return tuple((batch.prompt_lengths_B + batch.response_lengths_B).tolist())


def make_experience(
    tokens: TokenBatch,
    lengths: tuple[int, ...],
    old: Evaluation,
    score_B: Tensor,
    engine_logprobs_BT: Tensor,
    config: PolicyConfig,
    kl_coefficient: float,
) -> tuple[Experience, dict[str, float]]:
    """Rewards with the KL penalty, then advantages and weights; metrics about the engine's log-probabilities."""
    mask = tokens.mask_BT
    kl_BT = kl_penalty(old.logprobs_BT, old.ref_logprobs_BT, config.kl_estimator)
    advantages, returns = estimate_advantages(
        config.advantage,
        place_rewards(kl_BT, mask, score_B, kl_coefficient),
        old.values_BT,
        mask,
        gamma=config.gamma,
        lam=config.gae_lambda,
        samples_per_prompt=config.samples_per_prompt,
    )
    gap_N = (engine_logprobs_BT - old.logprobs_BT).abs()[mask]
    metrics = {
        "engine_logprob_gap": float(gap_N.mean()),
        "engine_logprob_gap_max": float(gap_N.max()),
    }
    weights = None
    if config.importance_cap is not None:
        weights, extra = truncated_importance(
            old.logprobs_BT, engine_logprobs_BT, mask, config.importance_cap
        )
        metrics |= {name: float(value) for name, value in extra.items()}
    return Experience(tokens, lengths, old, advantages, returns, weights), metrics
