"""The PPO learner: owns policy, value, reference, optimizer, KL controller and reward scale.

    learner = PPOLearner(model_path, config.policy, seed=0)
    metrics = learner.update(batch, reward_B)

One call is one PPO step (ALGORITHMS.md section 5). Its only randomness is the order of minibatches, which depends on
(seed, step); so state on disk plus the step number reproduce the rest of a run bit for bit.
Legend: B responses, T response tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morlaif_ray.backbone import load_causal_lm, load_tokenizer, save_pretrained
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import NumericalError
from morlaif_ray.rl.controllers import AdaptiveKLController, RunningScale
from morlaif_ray.rl.functional import (
    explained_variance,
    gae,
    kl_penalty,
    place_rewards,
    ppo_policy_loss,
    ppo_value_loss,
)
from morlaif_ray.rl.policy_model import PolicyModel, TokenBatch
from morlaif_ray.seeding import derive_seed
from morlaif_ray.tensor_ops import masked_mean, masked_whiten
from morlaif_ray.tensor_state import load_state, save_state, state_exists
from morlaif_ray.types import Float32Array, FloatArray, RolloutBatch, UpdateMetrics


@dataclasses.dataclass(frozen=True)
class Experience:
    """A rollout batch with everything that stays fixed during its epochs, each [B, T]."""

    tokens: TokenBatch
    old_logprobs_BT: Tensor
    old_values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor


class PPOLearner:
    """See the module docstring. Runs on one process; `device` is "cpu" or a CUDA device."""

    def __init__(
        self,
        model_path: str,
        config: PolicyConfig,
        *,
        seed: int,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        self.config = config
        self.seed = seed
        self.device = device
        self.step = 0
        self.tokenizer = load_tokenizer(model_path)
        model = load_causal_lm(model_path, dtype=dtype)
        self.reference: Any | None = None
        if config.lora is None:
            self.reference = copy.deepcopy(model).eval().requires_grad_(False).to(device)
        # LoRA's A matrices are drawn from the global generator.
        torch.manual_seed(derive_seed(seed, "adapters"))
        self.policy = PolicyModel(
            model,
            separate_critic=config.separate_critic,
            temperature=config.temperature,
            lora=config.lora,
        ).to(device)
        self.policy.eval()  # no dropout: the sampled and the trained policy are the same function
        self._trainable = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._trainable,
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
        )
        self.kl_controller = AdaptiveKLController(
            config.kl_coefficient, config.kl_target, config.kl_horizon, config.adaptive_kl
        )
        self.reward_scale = RunningScale()

    def update(self, batch: RolloutBatch, reward_B: FloatArray) -> UpdateMetrics:
        """One PPO step on a rollout batch and its scalar rewards; NumericalError on a non-finite loss or reward."""
        if not np.isfinite(reward_B).all():
            raise NumericalError(
                f"PPO step {self.step}: reward {int(np.argmin(np.isfinite(reward_B)))} is not finite"
            )
        tokens = self._to_tokens(batch)
        scaled_B = self._scale(reward_B)
        with torch.no_grad():
            old_logprobs, old_values, entropies = self._evaluate(tokens)
            ref_logprobs = self._reference(tokens)
        mask = tokens.mask_BT
        kl_BT = kl_penalty(old_logprobs, ref_logprobs, self.config.kl_estimator)
        rewards_BT = place_rewards(kl_BT, mask, scaled_B, self.kl_controller.coefficient)
        advantages, returns = gae(
            rewards_BT, old_values, mask, self.config.gamma, self.config.gae_lambda
        )
        experience = Experience(
            tokens, old_logprobs, old_values, masked_whiten(advantages, mask), returns
        )
        coefficient = self.kl_controller.coefficient
        rate = self._set_learning_rate()
        losses = self._optimise(experience)
        k1_B = (kl_penalty(old_logprobs, ref_logprobs) * mask).sum(dim=1)
        k3_B = (kl_penalty(old_logprobs, ref_logprobs, "k3") * mask).sum(dim=1)
        self.kl_controller.update(float(k1_B.mean()), len(batch))
        self.step += 1
        engine = torch.from_numpy(np.array(batch.logprobs_BT)).to(self.device)
        return UpdateMetrics(
            reward_mean=float(np.mean(reward_B)),
            scaled_reward_mean=float(scaled_B.mean()),
            kl_mean=float(k1_B.mean()),
            kl_k3_mean=float(k3_B.mean()),
            kl_coefficient=coefficient,
            policy_loss=losses["policy_loss"],
            value_loss=losses["value_loss"],
            approx_kl=losses["approx_kl"],
            clipfrac=losses["clipfrac"],
            entropy=float(masked_mean(entropies, mask)),
            explained_variance=explained_variance(old_values, returns, mask),
            grad_norm=losses["grad_norm"],
            learning_rate=rate,
            response_length_mean=float(np.mean(batch.response_lengths_B)),
            truncated_share=float(np.mean(batch.truncated_B)),
            engine_logprob_gap=float(masked_mean((engine - old_logprobs).abs(), mask)),
        )

    def _to_tokens(self, batch: RolloutBatch) -> TokenBatch:
        # Copies: the arrays of a remote batch are read-only views of shared memory.
        tokens = TokenBatch.from_lengths(
            torch.from_numpy(np.array(batch.tokens_BL)),
            torch.from_numpy(np.array(batch.prompt_lengths_B)),
            torch.from_numpy(np.array(batch.response_lengths_B)),
        )
        fields = {
            f.name: getattr(tokens, f.name).to(self.device) for f in dataclasses.fields(tokens)
        }
        return TokenBatch(**fields)

    def _scale(self, reward_B: FloatArray) -> Tensor:
        """clip(R / running std, +-reward_clip); the running std includes this batch."""
        if self.config.scale_reward:
            self.reward_scale.update(reward_B.tolist())
            reward_B = reward_B / self.reward_scale.std
        limit = self.config.reward_clip
        return torch.tensor(
            np.clip(reward_B, -limit, limit), dtype=torch.float32, device=self.device
        )

    def _microbatches(self, rows: Tensor) -> list[Tensor]:
        return list(rows.split(self.config.microbatch_size))

    def _evaluate(self, tokens: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, num_tokens = tokens.mask_BT.shape
        results = [torch.zeros(num_rows, num_tokens, device=self.device) for _ in range(3)]
        for rows in self._microbatches(torch.arange(num_rows, device=self.device)):
            part = tokens.rows(rows)
            for result, value in zip(results, self.policy(part), strict=True):
                result[rows, : value.shape[1]] = value.float() * part.mask_BT
        return results[0], results[1], results[2]

    def _reference(self, tokens: TokenBatch) -> Tensor:
        result = torch.zeros_like(tokens.mask_BT, dtype=torch.float32)
        for rows in self._microbatches(torch.arange(len(result), device=self.device)):
            part = tokens.rows(rows)
            value = self.policy.reference_logprobs(part, self.reference)
            result[rows, : value.shape[1]] = value * part.mask_BT
        return result

    def _set_learning_rate(self) -> float:
        """Linear warm-up, then constant."""
        rate = self.config.learning_rate
        if self.step < self.config.warmup_steps:
            rate *= (self.step + 1) / self.config.warmup_steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _optimise(self, experience: Experience) -> dict[str, float]:
        num_rows = experience.tokens.mask_BT.shape[0]
        size = max(1, num_rows // self.config.num_minibatches)
        records: list[dict[str, float]] = []
        for epoch in range(self.config.num_epochs):
            rng = np.random.default_rng(derive_seed(self.seed, "minibatches", self.step, epoch))
            order = torch.from_numpy(rng.permutation(num_rows)).to(self.device)
            for rows in order.split(size):
                records.append(self._minibatch_step(experience, rows))
        return {key: float(np.mean([record[key] for record in records])) for key in records[0]}

    def _minibatch_step(self, experience: Experience, rows: Tensor) -> dict[str, float]:
        """One optimizer step; the denominator is the response tokens of the whole minibatch."""
        denominator = experience.tokens.mask_BT[rows].sum().float()
        self.optimizer.zero_grad(set_to_none=True)
        sums = {"policy_loss": 0.0, "value_loss": 0.0, "approx_kl": 0.0, "clipfrac": 0.0}
        for micro in self._microbatches(rows):
            part = experience.tokens.rows(micro)
            width = part.mask_BT.shape[1]
            logprobs, values, _ = self.policy(part)
            policy_loss, metrics = ppo_policy_loss(
                logprobs,
                experience.old_logprobs_BT[micro, :width],
                experience.advantages_BT[micro, :width],
                part.mask_BT,
                self.config.clip_range,
                denominator,
            )
            value_loss = ppo_value_loss(
                values,
                experience.old_values_BT[micro, :width],
                experience.returns_BT[micro, :width],
                part.mask_BT,
                self.config.value_clip_range,
                denominator,
            )
            loss = policy_loss + self.config.value_coefficient * value_loss
            if not torch.isfinite(loss):
                raise NumericalError(
                    f"PPO step {self.step}: the loss is {float(loss.detach())}; lower policy.learning_rate"
                )
            loss.backward()
            share = float(part.mask_BT.sum()) / float(denominator)
            sums["policy_loss"] += float(policy_loss.detach())
            sums["value_loss"] += float(value_loss.detach())
            sums["approx_kl"] += share * float(metrics["approx_kl"])
            sums["clipfrac"] += share * float(metrics["clipfrac"])
        norm = torch.nn.utils.clip_grad_norm_(self._trainable, self.config.max_grad_norm)
        if not torch.isfinite(norm):
            raise NumericalError(
                f"PPO step {self.step}: the gradient is not finite; lower policy.learning_rate"
            )
        self.optimizer.step()
        return {**sums, "grad_norm": float(norm)}

    @torch.no_grad()
    def logprobs(self, batch: RolloutBatch) -> Float32Array:
        """Log-probabilities [B, T] (nats) of the response tokens under the current policy; 0 beyond the length."""
        logprobs_BT: Float32Array = self._evaluate(self._to_tokens(batch))[0].cpu().numpy()
        return logprobs_BT

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """The policy's weights by plain parameter name, as float32 arrays for the rollout workers."""
        return {name: w.float().cpu().numpy() for name, w in self.policy.merged_weights().items()}

    def save(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face folder."""
        save_pretrained(self.policy.plain_model(), self.tokenizer, folder)

    def save_checkpoint(self, folder: Path) -> None:
        """Everything that the next step depends on, published atomically."""
        extra = {
            "step": self.step,
            "kl_controller": self.kl_controller.state(),
            "reward_scale": self.reward_scale.state(),
        }
        save_state(folder, {"policy": self.policy}, self.optimizer, extra)

    def load_checkpoint(self, folder: Path) -> bool:
        """Restores a checkpoint; False where there is none."""
        if not state_exists(folder):
            return False
        extra = load_state(folder, {"policy": self.policy}, self.optimizer)
        self.step = int(extra["step"])
        self.kl_controller.restore(extra["kl_controller"])
        self.reward_scale.restore(extra["reward_scale"])
        return True
