"""A whole `PPOLearner.update` against the slow reference of `slow_ppo.py`, and what must not change its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from morlaif_ray.backbone import decoder_layers
from morlaif_ray.rl import PPOLearner
from morlaif_ray.types import RolloutBatch, UpdateMetrics
from tests.unit.rl.slow_ppo import CONFIG, REWARDS, SEED, SlowPPO

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


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
    "kept_in_part": {"num_minibatches": 1, "microbatch_size": 4},
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
