"""Adapters on a frozen base: the base is the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.rl import PPOLearner
from morlaif_ray.types import RolloutBatch
from tests.unit.rl.slow_ppo import CONFIG, REWARDS

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


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
