"""A whole PPO step written for reading: one response and one token at a time, own optimizer; for `test_learner.py`."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import RolloutBatch
from tests.unit.rl import slow_reference

SEED = 11
CONFIG = PolicyConfig(
    batch_size=6,
    num_epochs=2,
    num_minibatches=2,
    microbatch_size=2,
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.01,
    max_grad_norm=0.5,
    temperature=0.7,
    gamma=0.98,
    gae_lambda=0.9,
    clip_range=0.1,
    value_clip_range=0.05,
    value_coefficient=0.3,
    kl_coefficient=0.2,
    kl_horizon=100.0,
    reward_clip=1.5,
)
REWARDS = (np.array([0.3, -1.0, 2.0, 0.0, 5.0, 1.0]), np.array([1.0, 0.5, -2.0, 0.1, 0.2, 9.0]))


class SlowPPO:
    """The same step written for reading: unpadded responses, log-softmax over everything, sums as loops."""

    def __init__(self, path: str, config: PolicyConfig) -> None:
        self.config, self.step, self.seen = config, 0, []  # type: ignore[var-annotated]
        self.beta = config.kl_coefficient
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.reference = copy.deepcopy(self.model)
        self.critic = copy.deepcopy(self.model.transformer) if config.separate_critic else None
        self.head = nn.Linear(16, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        if self.critic is not None:
            self.parameters += list(self.critic.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, betas=config.adam_betas, weight_decay=config.weight_decay
        )

    def evaluate(self, model: Any, ids: list[int], start: int) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probability and value of every response token of one sequence."""
        output = model(torch.tensor([ids]), output_hidden_states=True)
        table = torch.log_softmax(output.logits[0] / self.config.temperature, dim=-1)
        states = output.hidden_states[-1][0]
        if self.critic is not None:
            states = self.critic(torch.tensor([ids])).last_hidden_state[0]
        logprobs = [table[t - 1, ids[t]] for t in range(start, len(ids))]
        return logprobs, [self.head(states[t - 1])[0] for t in range(start, len(ids))]

    def advantages(self, rewards: list[float], values: list[float]) -> list[float]:
        """A_t by the recursion's closed sum."""
        following = [*values[1:], 0.0]
        gamma, decay = self.config.gamma, self.config.gamma * self.config.gae_lambda
        deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
        return [
            sum(decay ** (k - t) * deltas[k] for k in range(t, len(deltas)))
            for t in range(len(deltas))
        ]

    def update(self, batch: RolloutBatch, reward_B: np.ndarray) -> dict[str, float]:
        config, num = self.config, len(batch)
        starts = batch.prompt_lengths_B.tolist()
        ends = (batch.prompt_lengths_B + batch.response_lengths_B).tolist()
        rows = [batch.tokens_BL[i, : ends[i]].tolist() for i in range(num)]
        self.seen += reward_B.tolist()
        scaled = np.clip(
            reward_B / np.std(self.seen, ddof=1), -config.reward_clip, config.reward_clip
        )
        old, values, advantages, returns, kls, weights = [], [], [], [], [], []
        with torch.no_grad():
            for i in range(num):
                logprobs, value = self.evaluate(self.model, rows[i], starts[i])
                plain, _ = self.evaluate(self.reference, rows[i], starts[i])
                old.append([float(x) for x in logprobs])
                values.append([float(x) for x in value])
                kls.append([float(p - q) for p, q in zip(logprobs, plain, strict=True)])
                rewards = [-self.beta * kl for kl in kls[i]]
                rewards[-1] += scaled[i]
                engine = batch.logprobs_BT[i, : len(logprobs)]
                cap = config.importance_cap
                weights.append(
                    [
                        1.0 if cap is None else min(math.exp(o - e), cap)
                        for o, e in zip(old[i], engine, strict=True)
                    ]
                )
                if config.advantage != "gae":
                    advantages.append([sum(rewards)] * len(rewards))
                    returns.append([0.0] * len(rewards))
                    continue
                advantages.append(self.advantages(rewards, values[i]))
                returns.append([a + v for a, v in zip(advantages[i], values[i], strict=True)])
        if config.advantage == "gae":
            advantages = slow_reference.whiten(advantages)
        else:
            groups = {"rloo": slow_reference.rloo_totals, "grpo": slow_reference.grpo_totals}
            totals = groups[config.advantage](
                [row[0] for row in advantages], config.samples_per_prompt
            )
            advantages = [[t] * len(row) for t, row in zip(totals, advantages, strict=True)]
        rate = config.learning_rate * min(1.0, (self.step + 1) / config.warmup_steps)
        self.optimizer.param_groups[0]["lr"] = rate
        records = []
        for epoch in range(config.num_epochs):
            rng = np.random.default_rng(derive_seed(SEED, "minibatches", self.step, epoch))
            order = rng.permutation(num)
            for start in range(0, num, num // config.num_minibatches):
                chosen = order[start : start + num // config.num_minibatches]
                records.append(
                    self.minibatch(chosen, rows, starts, old, values, advantages, returns, weights)
                )
        metrics = {key: float(np.mean([r[key] for r in records])) for key in records[0]}
        kl = float(np.mean([sum(row) for row in kls]))
        residual = [
            r - v
            for rr, vv in zip(returns, values, strict=True)
            for r, v in zip(rr, vv, strict=True)
        ]
        flat_returns = [r for row in returns for r in row]
        metrics |= {
            "kl_mean": kl,
            "kl_k3_mean": float(np.mean([sum(math.exp(-k) - 1 + k for k in row) for row in kls])),
            "kl_coefficient": self.beta,
            "learning_rate": rate,
            "scaled_reward_mean": float(scaled.mean()),
            "reward_mean": float(reward_B.mean()),
            "importance_weight_mean": float(np.mean([w for row in weights for w in row])),
        }
        if config.advantage == "gae":
            metrics["explained_variance"] = 1 - float(np.var(residual) / np.var(flat_returns))
        self.beta *= (
            1 + float(np.clip(kl / config.kl_target - 1, -0.2, 0.2)) * num / config.kl_horizon
        )
        self.step += 1
        return metrics

    def minibatch(self, chosen: Any, rows: Any, starts: Any, old: Any, old_values: Any,
                  advantages: Any, returns: Any, weights: Any) -> dict[str, float]:  # fmt: skip
        config = self.config
        policy_terms, value_terms, clipped, kl = [], [], [], []
        for i in chosen:
            logprobs, values = self.evaluate(self.model, rows[i], starts[i])
            for t, (logprob, value) in enumerate(zip(logprobs, values, strict=True)):
                ratio, a = (logprob - old[i][t]).exp(), advantages[i][t]
                limited = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
                policy_terms.append(-weights[i][t] * torch.minimum(a * ratio, a * limited))
                clipped.append((a * limited < a * ratio).item())
                kl.append((ratio - 1 - (logprob - old[i][t])).item())
                v, r, e = old_values[i][t], returns[i][t], config.value_clip_range
                near = value.clamp(v - e, v + e)
                value_terms.append(0.5 * torch.maximum((value - r) ** 2, (near - r) ** 2))
        policy_loss = sum(policy_terms) / len(policy_terms)
        value_loss = sum(value_terms) / len(value_terms)
        if config.advantage != "gae":
            value_loss = torch.zeros(())
        self.optimizer.zero_grad()
        (policy_loss + config.value_coefficient * value_loss).backward()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
        for grad in grads:
            grad *= min(1.0, config.max_grad_norm / (norm + 1e-6))
        self.optimizer.step()
        return {
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "clipfrac": float(np.mean(clipped)),
            "approx_kl": float(np.mean(kl)),
            "grad_norm": norm,
        }
