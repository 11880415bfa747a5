"""The real vLLM engine in this process: the same distribution as transformers, new weights without a restart."""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ArtifactError, ConfigError
from morlaif_ray.rl import PPOLearner
from morlaif_ray.rl.adapter_transfer import unpack
from morlaif_ray.rl.generation import SamplingSettings, TransformersEngine
from morlaif_ray.rl.vllm_engine import VllmEngine, VllmSettings
from morlaif_ray.types import GenerationRequest, RolloutBatch
from tests.vllm.tiny_models import PROMPTS, largest_gap, make_model, requests, weights_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
SETTINGS = SamplingSettings(max_new_tokens=12, temperature=0.9)
EXACT = 1e-4
"""Nats. Measured: 2e-6."""
ADAPTED: dict[str, Any] = {"gpt2": "all-linear", "llama": ["q_proj", "v_proj"]}
"""Llama's q, k and v are one layer in vLLM, of which two thirds have adapters here."""
LONG = ("\n\nHuman: " + "red sun moon green " * 40 + "\n\nAssistant:",)
"""160 tokens: longer than a block of the prefix cache."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """An engine with the model that it was made from."""

    engine: VllmEngine
    model: Any
    folder: Path
    kind: str


@pytest.fixture(scope="module", params=["gpt2", "llama", "llama-sliced"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    kind, _, sliced = request.param.partition("-")
    folder = tmp_path_factory.mktemp("vllm") / request.param
    model = make_model(kind, folder)
    settings = VllmSettings(kv_cache_mb=32, tensor_parallel_size=2 if sliced else 1)
    engine = VllmEngine(folder, settings=settings)
    yield Pair(engine, model, folder, kind)
    engine.close()


@pytest.fixture(autouse=True)
def _original_weights(pair: Pair) -> Iterator[None]:
    yield
    if pair.engine.policy_version:
        pair.engine.load_model(str(pair.folder))


def response_tokens(batch: RolloutBatch, row: int) -> list[int]:
    start = int(batch.prompt_lengths_B[row])
    return batch.tokens_BL[row, start : start + int(batch.response_lengths_B[row])].tolist()


def test_logprobs_are_those_of_transformers_at_the_sampling_temperature(pair: Pair) -> None:
    batch = pair.engine.generate(requests(24), SETTINGS)
    assert largest_gap(pair.model, batch, 0.9) < EXACT
    assert largest_gap(pair.model, batch, 1.0) > 100 * EXACT  # the check would see a wrong one
    assert len(set(batch.responses)) > 10
    for row in range(24):
        assert (batch.logprobs_BT[row, batch.response_lengths_B[row] :] == 0).all()


def test_greedy_responses_are_those_of_transformers(pair: Pair) -> None:
    greedy = dataclasses.replace(SETTINGS, temperature=0.0)
    expected = TransformersEngine.from_path(pair.folder).generate(requests(3), greedy)
    batch = pair.engine.generate(requests(3), greedy)
    assert batch.responses == expected.responses
    np.testing.assert_array_equal(batch.tokens_BL, expected.tokens_BL)
    np.testing.assert_allclose(batch.logprobs_BT, expected.logprobs_BT, atol=EXACT)


def test_a_response_depends_on_its_seed_and_not_on_its_batch(pair: Pair) -> None:
    asked = requests(24)
    together = pair.engine.generate(asked, SETTINGS)
    for row, request in enumerate(asked):
        alone = pair.engine.generate([request], SETTINGS)
        num = int(alone.response_lengths_B[0])
        assert response_tokens(alone, 0) == response_tokens(together, row)
        np.testing.assert_array_equal(alone.logprobs_BT[0], together.logprobs_BT[row, :num])
    samples = [GenerationRequest(PROMPTS[0], seed) for seed in range(12)]
    assert len(set(pair.engine.generate(samples, SETTINGS).responses)) > 4


def test_callers_in_several_threads_share_a_batch_and_get_their_own_responses(pair: Pair) -> None:
    asked = requests(16)
    expected = [pair.engine.generate([request], SETTINGS) for request in asked]
    found: dict[int, RolloutBatch] = {}

    def ask(index: int) -> None:
        found[index] = pair.engine.generate([asked[index]], SETTINGS)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60.0)
    assert sorted(found) == list(range(16))
    for index, batch in enumerate(expected):
        assert found[index].responses == batch.responses
        np.testing.assert_array_equal(found[index].logprobs_BT, batch.logprobs_BT)


def test_responses_end_as_the_other_engine_ends_them(pair: Pair) -> None:
    stopping = dataclasses.replace(SETTINGS, stop=("\n\nHuman:", "\n\nAssistant:"))
    tokenizer = pair.engine.tokenizer
    batch = pair.engine.generate(requests(40), stopping)
    marks = tokenizer.convert_tokens_to_ids(["Human:", "Assistant:"])
    ends = {"mark": 0, "eos": 0, "cut": 0}
    for row in range(40):
        tokens = response_tokens(batch, row)
        end = "mark" if tokens[-1] in marks else "cut"
        end = "eos" if tokens[-1] == tokenizer.eos_token_id else end
        ends[end] += 1
        assert not set(tokens[:-1]) & {*marks, tokenizer.eos_token_id}
        assert bool(batch.truncated_B[row]) == (end == "cut")
        assert len(tokens) == 12 or end != "cut"
        assert batch.responses[row].startswith(" ")
        for word in ("Human:", "Assistant:", "<eos>"):
            assert word not in batch.responses[row]
    assert min(ends["mark"], ends["eos"]) > 0


def test_a_prompt_longer_than_the_context_keeps_its_end(pair: Pair) -> None:
    long = GenerationRequest("\n\nHuman: " + "red " * 400 + "\n\nAssistant:", 3)
    batch = pair.engine.generate([long], SETTINGS)
    assert batch.prompt_lengths_B[0] == 256 - 12
    with pytest.raises(ConfigError, match="256 new tokens leave no room for a prompt within the"):
        pair.engine.generate([long], SamplingSettings(max_new_tokens=256))


def test_new_weights_change_the_outputs_at_once_and_keep_nothing_of_the_old(
    pair: Pair, tmp_path: Path
) -> None:
    asked = requests(12) + requests(6, LONG)
    before = pair.engine.generate(asked, SETTINGS)
    other = make_model(pair.kind, tmp_path / "other", seed=4)
    pair.engine.load_weights(weights_of(other), 7)
    after = pair.engine.generate(asked, SETTINGS)
    assert (before.policy_version, after.policy_version) == (0, 7)
    assert after.prompt_lengths_B.max() > 128
    assert largest_gap(other, after, 0.9) < EXACT  # tied output layer and cached prefixes included
    assert largest_gap(pair.model, after, 0.9) > 0.1
    assert after.responses != before.responses
    pair.engine.load_weights(weights_of(pair.model), 8)
    again = pair.engine.generate(asked, SETTINGS)
    assert again.responses == before.responses
    np.testing.assert_array_equal(again.logprobs_BT, before.logprobs_BT)


def test_a_part_of_the_weights_or_an_unknown_one_is_refused_and_changes_nothing(
    pair: Pair,
) -> None:
    before = pair.engine.generate(requests(4), SETTINGS)
    whole = weights_of(pair.model)
    name = next(iter(whole))
    with pytest.raises(KeyError, match=f"weight '{name}' is missing; vLLM takes all weights or"):
        pair.engine.load_weights({k: v for k, v in whole.items() if k != name}, 1)
    with pytest.raises(KeyError, match=r"'no\.such' is not a parameter of the rollout model"):
        pair.engine.load_weights({**whole, "no.such": np.zeros(1)}, 1)
    assert pair.engine.policy_version == 0
    again = pair.engine.generate(requests(4), SETTINGS)
    np.testing.assert_array_equal(again.logprobs_BT, before.logprobs_BT)


def test_adapters_merged_by_the_engine_sample_as_the_learners_merged_weights(pair: Pair) -> None:
    """Twice, so that the second adapters meet the base and not the first; the base stays as it was."""
    asked = requests(12) + requests(6, LONG)
    before = pair.engine.generate(asked, SETTINGS)
    lora = LoraConfig(rank=3, alpha=5.0, target_modules=ADAPTED[pair.kind])
    learner = PPOLearner(str(pair.folder), PolicyConfig(lora=lora), seed=0)
    base = learner.policy.base_checksum
    assert base is not None
    matrices = [p for n, p in learner.policy.named_parameters() if "lora_B" in n]
    for version, std in ((3, 0.5), (4, 0.3), (5, 0.0)):
        for matrix in matrices:
            torch.nn.init.normal_(matrix, std=std)
        pair.engine.load_adapters(unpack(learner.policy.sent_weights()), base, version)
        after = pair.engine.generate(asked, SETTINGS)
        assert after.policy_version == version
        if not std:
            np.testing.assert_array_equal(after.logprobs_BT, before.logprobs_BT)
            continue
        assert after.responses != before.responses
        pair.engine.load_weights(learner.weights(), version)
        expected = pair.engine.generate(asked, SETTINGS)
        assert after.responses == expected.responses
        np.testing.assert_array_equal(after.logprobs_BT, expected.logprobs_BT)
    with pytest.raises(ArtifactError, match=r"base weights \(checksum .*\) are not the learner's"):
        pair.engine.load_adapters({}, base + 1, 6)
    assert pair.engine.policy_version == 5


def test_another_folder_replaces_the_model(pair: Pair, tmp_path: Path) -> None:
    other = make_model(pair.kind, tmp_path / "other", seed=5)
    pair.engine.load_weights(weights_of(pair.model), 3)
    pair.engine.load_model(str(tmp_path / "other"))
    batch = pair.engine.generate(requests(8), SETTINGS)
    pair.engine.load_model(str(pair.folder))
    assert batch.policy_version == 0
    assert largest_gap(other, batch, 0.9) < EXACT
