"""A whole `PPOLearner.update` against a slow reference: one response and one token at a time, own optimizer."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from morlaif_ray.backbone import decoder_layers, load_tokenizer
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ArtifactError, NumericalError
from morlaif_ray.rl import PPOLearner
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import RolloutBatch, UpdateMetrics
from tests.unit.rl import slow_reference

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

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


def without_key_biases(name: str, tensor: Tensor) -> Tensor:
    """The softmax ignores key biases: their true gradient is 0, and Adam turns rounding noise into steps."""
    return torch.cat([tensor[:16], tensor[32:]]) if name.endswith("attn.c_attn.bias") else tensor


def assert_equal_weights(learner: PPOLearner, slow: SlowPPO) -> None:
    expected = dict(slow.model.named_parameters())
    for name, parameter in learner.policy.model.named_parameters():
        torch.testing.assert_close(
            without_key_biases(name, parameter),
            without_key_biases(name, expected[name]),
            rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
    torch.testing.assert_close(
        learner.policy.value_head.weight, slow.head.weight, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(learner.policy.value_head.bias, slow.head.bias, rtol=1e-5, atol=1e-5)


VARIANTS: dict[str, dict[str, Any]] = {
    "value_head": {},
    "critic": {"separate_critic": True},
    "kept_forward": {"num_minibatches": 1, "microbatch_size": 64},
    "kept_first_of_two": {"microbatch_size": 3},
    "token_budget": {"microbatch_tokens": 16, "microbatch_size": 64},
    "chunks": {"logprob_chunk_tokens": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "importance": {"importance_cap": 1.2},
    "rloo": {"advantage": "rloo", "samples_per_prompt": 3},
    "grpo": {"advantage": "grpo", "samples_per_prompt": 2, "importance_cap": 2.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_updates_equal_the_slow_reference(
    gpt2: str, batch: Callable[..., RolloutBatch], variant: str
) -> None:
    config = CONFIG.model_copy(update=VARIANTS[variant])
    learner, slow = PPOLearner(gpt2, config, seed=SEED), SlowPPO(gpt2, config)
    before = {name: p.detach().clone() for name, p in learner.policy.model.named_parameters()}
    for step, rewards in enumerate(REWARDS):
        metrics = dataclasses.asdict(learner.update(batch(step), rewards))
        for name, value in slow.update(batch(step), rewards).items():
            assert metrics[name] == pytest.approx(value, rel=1e-3, abs=2e-5), name
        assert_equal_weights(learner, slow)
        assert learner.kl_controller.coefficient == pytest.approx(slow.beta, rel=1e-6)
    if config.num_minibatches > 1:
        assert metrics["clipfrac"] > 0.0  # the clip was met
    moved = [(p - before[n]).abs().max().item() for n, p in learner.policy.model.named_parameters()]
    assert min(moved) > 1e-4


def test_the_first_update_has_no_divergence_and_no_values(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    metrics = PPOLearner(gpt2, CONFIG, seed=0).update(batch(0), REWARDS[0])
    assert metrics.kl_mean == pytest.approx(0.0, abs=1e-6)
    assert metrics.kl_coefficient == 0.2
    assert metrics.explained_variance == pytest.approx(0.0, abs=1e-6)
    assert metrics.response_length_mean == pytest.approx(batch(0).response_lengths_B.mean())
    assert metrics.truncated_share == 0.5


def test_the_engine_gap_is_the_mean_difference_over_response_tokens(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    learner = PPOLearner(gpt2, CONFIG, seed=0)
    made = batch(0)
    with torch.no_grad():
        tokens = learner._to_tokens(made)
        own = learner.policy.logprobs(tokens)
    shifted = np.where(tokens.mask_BT, own + 0.25, 0.0).astype(np.float32)
    metrics = learner.update(dataclasses.replace(made, logprobs_BT=shifted), REWARDS[0])
    assert metrics.engine_logprob_gap == pytest.approx(0.25, abs=1e-5)


def test_micro_batch_size_changes_no_result(gpt2: str, batch: Callable[..., RolloutBatch]) -> None:
    def weights(size: int) -> dict[str, Any]:
        config = CONFIG.model_copy(update={"microbatch_size": size})
        learner = PPOLearner(gpt2, config, seed=0)
        learner.update(batch(0), REWARDS[0])
        return learner.weights()

    one, all_rows = weights(1), weights(64)
    for name, value in one.items():
        if not name.endswith("c_attn.bias"):
            np.testing.assert_allclose(value, all_rows[name], atol=2e-5, err_msg=name)


def test_a_critic_of_its_own_leaves_the_policy_to_the_policy_loss(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    def updated(**changes: Any) -> PPOLearner:
        config = CONFIG.model_copy(update={"max_grad_norm": 1e9, **changes})
        learner = PPOLearner(gpt2, config, seed=0)
        learner.update(batch(0), REWARDS[0])
        return learner

    apart, ignored = updated(separate_critic=True), updated(value_coefficient=0.0)
    for name, value in ignored.weights().items():
        np.testing.assert_allclose(apart.weights()[name], value, atol=1e-6, err_msg=name)
    original = PPOLearner(gpt2, CONFIG, seed=0).policy.model.transformer.wte.weight
    assert apart.policy.critic is not None
    assert not torch.equal(apart.policy.critic.wte.weight, original)


def test_reward_raises_the_probability_of_what_was_rewarded(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 3e-3, "kl_coefficient": 0.0})
    learner, made = PPOLearner(gpt2, config, seed=0), batch(0)
    tokens = learner._to_tokens(made)
    with torch.no_grad():
        before = (learner.policy.logprobs(tokens) * tokens.mask_BT).sum(1)
    for _ in range(5):
        learner.update(made, np.array([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]))
    with torch.no_grad():
        change = (learner.policy.logprobs(tokens) * tokens.mask_BT).sum(1) - before
    assert bool((change[[1, 3, 5]] > change[[0, 2, 4]].max()).all())


def test_a_model_with_dropout_is_trained_without(
    model_path: Callable[[str], str], batch: Callable[..., RolloutBatch]
) -> None:
    def updated(kind: str) -> tuple[UpdateMetrics, dict[str, Any]]:
        learner = PPOLearner(model_path(kind), CONFIG, seed=0)
        return learner.update(batch(0), REWARDS[0]), learner.weights()

    (plain, weights), (dropout, others) = updated("gpt2"), updated("gpt2_dropout")
    assert dropout == plain
    for name, value in weights.items():
        np.testing.assert_array_equal(others[name], value, err_msg=name)


def test_read_only_arrays_are_taken_and_left_alone(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    made, rewards = batch(0), REWARDS[0].copy()
    for array in (made.tokens_BL, made.logprobs_BT, made.prompt_lengths_B, rewards):
        array.flags.writeable = False
    PPOLearner(gpt2, CONFIG, seed=0).update(made, rewards)
    np.testing.assert_array_equal(made.tokens_BL, batch(0).tokens_BL)
    np.testing.assert_array_equal(rewards, REWARDS[0])


def test_a_reward_that_is_not_finite_names_step_and_row(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    learner = PPOLearner(gpt2, CONFIG, seed=0)
    with pytest.raises(NumericalError, match="PPO step 0: reward 2 is not finite"):
        learner.update(batch(0), np.array([0.0, 1.0, np.nan, 0.0, 0.0, np.inf]))
    assert learner.step == 0
    assert learner.reward_scale.count == 0


def test_samples_that_cannot_be_learned_are_written_to_the_file_that_the_error_names(
    gpt2: str, batch: Callable[..., RolloutBatch], tmp_path: Path
) -> None:
    made = dataclasses.replace(batch(0), prompts=tuple("abcdef"), responses=tuple("uvwxyz"))
    learner = PPOLearner(gpt2, CONFIG, seed=0, failure_dir=tmp_path / "arm")
    rewards = np.array([0.0, 1.0, np.nan, 0.0, 0.0, np.inf])
    scores = {"helpfulness": np.array([0.5, 0.5, np.nan, 0.5, 0.5, 2.0])}
    with pytest.raises(NumericalError) as caught:
        learner.update(made, rewards, scores)
    path = tmp_path / "arm" / "not_finite_step_0.jsonl"
    assert str(caught.value).endswith(f"reward 2 is not finite; the samples are in {path}")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["row"], r["prompt"], r["response"]) for r in records] == [
        (2, "c", "w"),
        (5, "f", "z"),
    ]
    assert math.isnan(records[0]["reward"])
    assert records[1]["scores"] == {"helpfulness": 2.0}


def test_a_gradient_that_overflows_stops_before_it_changes_a_weight(
    gpt2: str, batch: Callable[..., RolloutBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = PPOLearner(gpt2, CONFIG, seed=0, failure_dir=tmp_path)
    before = {name: value.copy() for name, value in learner.weights().items()}
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(float("inf"))
    )
    with pytest.raises(NumericalError, match=r"the gradient is not finite; lower policy\.learning"):
        learner.update(batch(0), REWARDS[0])
    for name, value in learner.weights().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    records = (tmp_path / "not_finite_step_0.jsonl").read_text().splitlines()
    assert len(records) == 3  # no single row stands out: the whole minibatch


def test_gradient_checkpointing_changes_no_result(
    model_path: Callable[[str], str], batch: Callable[..., RolloutBatch]
) -> None:
    def updated(kind: str, checkpointing: bool) -> dict[str, Any]:
        config = CONFIG.model_copy(update={"gradient_checkpointing": checkpointing})
        learner = PPOLearner(model_path(kind), config, seed=0)
        layers = decoder_layers(learner.policy)
        assert len(layers) == 2
        assert all(
            layer.training == checkpointing for layer in layers
        )  # else nothing is recomputed
        learner.update(batch(0), REWARDS[0])
        return learner.weights()

    for name, value in updated("gpt2_dropout", False).items():
        np.testing.assert_array_equal(updated("gpt2_dropout", True)[name], value, err_msg=name)


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(
    gpt2: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt2, folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["comet"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ArtifactError, match=r"model: the tokenizer has 12 tokens and the model only 11"
    ):
        PPOLearner(str(folder), CONFIG, seed=0)


def test_the_schedule_ends_with_the_arms_own_number_of_steps(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    config = CONFIG.model_copy(update={"schedule": "linear", "warmup_steps": 0, "num_steps": 100})
    learner = PPOLearner(gpt2, config, seed=0, num_steps=2)
    assert learner.update(batch(0), REWARDS[0]).learning_rate == pytest.approx(1e-3)
    assert learner.update(batch(1), REWARDS[1]).learning_rate == pytest.approx(5e-4)


def test_bf16_autocast_keeps_weights_in_full_precision_and_stays_near(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    def made(autocast: bool) -> tuple[UpdateMetrics, PPOLearner]:
        config = CONFIG.model_copy(update={"bf16_autocast": autocast, "num_epochs": 1})
        learner = PPOLearner(gpt2, config, seed=0)
        return learner.update(batch(0), REWARDS[0]), learner

    (full, _), (half, learner) = made(False), made(True)
    assert {p.dtype for p in learner.policy.parameters()} == {torch.float32}
    assert half.entropy == pytest.approx(full.entropy, rel=0.02)
    assert half.entropy != full.entropy


def test_a_loss_that_is_not_finite_ends_the_run(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    learner = PPOLearner(gpt2, CONFIG, seed=0)
    with torch.no_grad():
        learner.policy.model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(NumericalError, match=r"PPO step 0: the loss is nan; lower policy.learning"):
        learner.update(batch(0), REWARDS[0])


class TestLora:
    """Adapters on a frozen base: the base is the reference."""

    CONFIG = CONFIG.model_copy(update={"lora": LoraConfig(rank=4), "learning_rate": 5e-3})

    def test_the_reference_is_the_base_with_its_adapters_off(
        self, gpt2: str, batch: Callable[..., RolloutBatch]
    ) -> None:
        learner = PPOLearner(gpt2, self.CONFIG, seed=0)
        plain = PPOLearner(gpt2, CONFIG, seed=0)
        tokens = learner._to_tokens(batch(1))
        assert learner.update(batch(0), REWARDS[0]).kl_mean == pytest.approx(0.0, abs=1e-5)
        learner.update(batch(1), REWARDS[1])
        with torch.no_grad():
            base = plain.policy.logprobs(tokens)
            reference = learner._reference(tokens)
            torch.testing.assert_close(
                reference * tokens.mask_BT, base * tokens.mask_BT, rtol=1e-5, atol=1e-5
            )
            moved = (learner.policy.logprobs(tokens) - base)[tokens.mask_BT]
        assert float(moved.abs().max()) > 1e-3

    def test_only_adapters_and_the_value_head_learn(self, gpt2: str) -> None:
        learner = PPOLearner(gpt2, self.CONFIG, seed=0)
        names = [n for n, p in learner.policy.named_parameters() if p.requires_grad]
        assert all("lora_" in name or name.startswith("value_head") for name in names)
        assert sum("lora_A" in name for name in names) == 2 * 4  # c_attn, c_proj, c_fc, c_proj

    def test_merged_weights_are_the_policy_under_plain_names(
        self, gpt2: str, batch: Callable[..., RolloutBatch]
    ) -> None:
        learner = PPOLearner(gpt2, self.CONFIG, seed=0)
        learner.update(batch(0), REWARDS[0])
        merged = copy.deepcopy(learner.policy.model).merge_and_unload()
        torch.testing.assert_close(
            dict(learner.policy.merged_weights()),
            {name: p.detach() for name, p in merged.named_parameters()},
            rtol=1e-6, atol=1e-7,
        )  # fmt: skip
        plain = PPOLearner(gpt2, CONFIG, seed=0)
        names = dict(plain.policy.model.named_parameters())
        weights = learner.weights()
        assert set(weights) == set(names)
        tokens = learner._to_tokens(batch(1))
        with torch.no_grad():
            for name, value in weights.items():
                names[name].copy_(torch.from_numpy(value))
            torch.testing.assert_close(
                learner.policy.logprobs(tokens) * tokens.mask_BT,
                plain.policy.logprobs(tokens) * tokens.mask_BT,
                rtol=1e-4, atol=1e-4,
            )  # fmt: skip

    def test_the_seed_alone_decides_the_adapters(self, gpt2: str) -> None:
        def start(seed: int) -> Tensor:
            learner = PPOLearner(gpt2, self.CONFIG, seed=seed)
            return next(p for n, p in learner.policy.named_parameters() if "lora_A" in n)

        first = start(5)
        torch.randn(3)
        assert torch.equal(first, start(5))
        assert not torch.equal(first, start(6))
