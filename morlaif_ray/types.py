"""The records that cross from one stage to the next. Stages meet here and nowhere else.

Legend for array names: B batch, K principles, L sequence tokens (prompt and response), T response tokens.
Every record is frozen. Floats are nats or logits unless said otherwise. Missing is NaN plus a reason, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Split = Literal["sft", "preference", "weights", "test", "policy"]
SPLITS: tuple[Split, ...] = ("sft", "preference", "weights", "test", "policy")

Order = Literal["ab", "ba"]
JudgementStatus = Literal["ok", "tie", "unusable", "failed"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. Produced by `data`, consumed by `sample_pairs` and `train_policy`."""

    prompt_id: str
    """Content hash of `text`."""
    text: str
    """Dialogue in hh format: turns begin with "\\n\\nHuman:" or "\\n\\nAssistant:"; ends with "\\n\\nAssistant:"."""
    split: Split
    """Assigned by the hash of `text`, so that no prompt stands in two splits."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt with one demonstrated response. Produced by `data`, consumed by `rl.sft`."""

    prompt_id: str
    prompt: str
    response: str
    """Text after "Assistant:", with its leading space."""


@dataclass(frozen=True, slots=True)
class ResponsePair:
    """Two responses to one prompt. Produced by `data` or `sample_pairs`, consumed by `feedback` and `preference`."""

    pair_id: str
    """Content hash of (prompt, response_a, response_b)."""
    prompt_id: str
    prompt: str
    response_a: str
    response_b: str
    split: Split
    human_label: float
    """1.0 where a person preferred `response_a`, 0.0 where `response_b`, NaN where no one was asked."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judge said of one pair on one question, both orders combined (ALGORITHMS.md section 1)."""

    pair_id: str
    principle: str
    """A principle's name, or a single-objective question ("general", "random")."""
    status: JudgementStatus
    log_odds: float
    """Log-odds (nats) that response_a is better, position bias removed; NaN unless status is "ok" or "tie"."""
    position_bias: float
    """(l_AB + l_BA) / 2 in nats; NaN when only one order was asked."""
    reason: str
    """Why the judgement is unusable or failed; empty otherwise."""
    judge: str
    """Judge and model as the provider returned them."""

    @property
    def label(self) -> float:
        """Soft label sigmoid(log_odds): probability that response_a is better; NaN when unusable."""
        if np.isnan(self.log_odds):
            return float("nan")
        return float(1.0 / (1.0 + np.exp(-np.clip(self.log_odds, -60.0, 60.0))))


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Raw PM scores of a batch of texts. Produced by the panel, consumed by `reward` and `evaluation`."""

    scores_BK: FloatArray
    """Raw scores [B, K]; NaN where a score could not be had."""
    principles: tuple[str, ...]
    """The K column names, in order."""
    reasons: tuple[str, ...] = ()
    """One reason per missing column or batch, empty when nothing is missing."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One response to generate. The seed makes the sample independent of batch composition and worker."""

    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Sampled responses with everything PPO needs. Produced by `rollout_worker`, consumed by `ppo_learner`."""

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    """Response text up to (not including) EOS or a stop string, length B."""
    tokens_BL: IntArray
    """Prompt then response tokens (EOS included when sampled), right-padded."""
    prompt_lengths_B: IntArray
    response_lengths_B: IntArray
    """Number of response tokens, EOS included; at least 1."""
    logprobs_BT: Float32Array
    """Engine's log-probability (nats) of each sampled token at the sampling temperature; 0 beyond the length."""
    truncated_B: BoolArray
    """True where the response ended without EOS or a stop string."""
    policy_version: int

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, slots=True)
class UpdateMetrics:
    """What one PPO step did. Produced by `PPOLearner.update`, consumed by trackers and the report."""

    reward_mean: float
    """Mean scalar reward before running-std scaling."""
    scaled_reward_mean: float
    kl_mean: float
    """Mean over responses of the summed per-token k1 KL estimate (nats) to the reference."""
    kl_k3_mean: float
    kl_coefficient: float
    policy_loss: float
    value_loss: float
    approx_kl: float
    clipfrac: float
    entropy: float
    explained_variance: float
    grad_norm: float
    learning_rate: float
    response_length_mean: float
    truncated_share: float
    engine_logprob_gap: float
    """Mean absolute difference between engine and learner log-probabilities (nats)."""
    engine_logprob_gap_max: float = 0.0
    importance_weight_mean: float = 1.0
    """Mean over response tokens of the truncated importance weight; 1 where `policy.importance_cap` is not set."""
    importance_truncated_share: float = 0.0
    """Share of response tokens whose weight met the cap."""


@dataclass(frozen=True, slots=True)
class GateReport:
    """One claim checked against its measured figure, for the report."""

    claim: str
    holds: bool
    evidence: str


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with a 95% bootstrap interval."""

    value: float
    low: float
    high: float
    num: int
    """Number of independent units (prompts) behind the estimate."""
