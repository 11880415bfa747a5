"""The policy sees the same log-probabilities as the plain model, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.rl import PPOLearner
from morlaif_ray.rl.generation import TransformersEngine
from morlaif_ray.types import RolloutBatch

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

KINDS = ("gpt2", "llama_tied", "llama_untied", "gemma", "gemma2")
TEMPERATURE = 0.7
CONFIG = PolicyConfig(batch_size=6, temperature=TEMPERATURE, learning_rate=1e-3, num_epochs=1)


def plain_logprobs(model: Any, batch: RolloutBatch, row: int) -> torch.Tensor:
    """log-softmax of one unpadded sequence, gathered at its response tokens."""
    start = int(batch.prompt_lengths_B[row])
    ids = torch.tensor(batch.tokens_BL[row, : start + int(batch.response_lengths_B[row])])
    table = torch.log_softmax(model(ids.unsqueeze(0)).logits[0].float() / TEMPERATURE, dim=-1)
    return table[start - 1 : -1].gather(1, ids[start:].unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_reference_equal_the_plain_model(
    model_path: Callable[[str], str],
    batch: Callable[..., RolloutBatch],
    kind: str,
    lora: LoraConfig | None,
) -> None:
    path, made = model_path(kind), batch(2)
    learner = PPOLearner(path, CONFIG.model_copy(update={"lora": lora}), seed=0)
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = learner._to_tokens(made)
    with torch.no_grad():
        policy = learner._evaluate(tokens)[0]
        reference = learner._reference(tokens)
        for row in range(len(made)):
            expected = plain_logprobs(plain, made, row)
            num = len(expected)
            torch.testing.assert_close(policy[row, :num], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(reference[row, :num], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_updated_policy_reaches_rollouts_and_disk(
    model_path: Callable[[str], str],
    batch: Callable[..., RolloutBatch],
    tmp_path: Path,
    kind: str,
    lora: LoraConfig | None,
) -> None:
    path, made = model_path(kind), batch(2)
    learner = PPOLearner(path, CONFIG.model_copy(update={"lora": lora}), seed=0)
    learner.update(made, np.array([1.0, -1.0, 0.5, 2.0, 0.0, -2.0]))
    engine = TransformersEngine.from_path(path)
    engine.load_weights(learner.weights(), version=1)
    learner.save(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        policy = learner._evaluate(learner._to_tokens(made))[0]
        for model in (engine.model, saved):
            for row in range(len(made)):
                expected = plain_logprobs(model, made, row)
                torch.testing.assert_close(
                    policy[row, : len(expected)], expected, rtol=1e-4, atol=1e-4
                )


def test_entropies_are_those_of_the_tempered_distribution(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    learner, made = PPOLearner(gpt2, CONFIG, seed=0), batch(2)
    with torch.no_grad():
        entropies = learner._evaluate(learner._to_tokens(made))[2]
        start = int(made.prompt_lengths_B[3])
        ids = torch.tensor(made.tokens_BL[3:4, : start + 1])
        plain = AutoModelForCausalLM.from_pretrained(gpt2).eval()
        logits = plain(ids).logits[0, start - 1] / TEMPERATURE
    assert float(entropies[3, 0]) == pytest.approx(
        float(torch.distributions.Categorical(logits=logits).entropy()), abs=1e-5
    )
