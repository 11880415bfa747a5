"""Sampling: what a response depends on, what it may not depend on, and where it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.errors import ConfigError
from morlaif_ray.rl.generation import SamplingSettings, TransformersEngine, _choose
from morlaif_ray.types import GenerationRequest, RolloutBatch

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

PROMPTS = [
    "\n\nHuman: red\n\nAssistant:",
    "\n\nHuman: sun moon star sun moon\n\nAssistant:",
    "\n\nHuman: blue green\n\nAssistant: star\n\nHuman: red red\n\nAssistant:",
]
SETTINGS = SamplingSettings(max_new_tokens=12, temperature=0.9)


def requests(num: int, first_seed: int = 0) -> list[GenerationRequest]:
    return [GenerationRequest(PROMPTS[i % 3], first_seed + i) for i in range(num)]


@pytest.fixture
def engine(gpt2: str) -> TransformersEngine:
    return TransformersEngine.from_path(gpt2)


def response_tokens(batch: RolloutBatch, row: int) -> list[int]:
    start = int(batch.prompt_lengths_B[row])
    return batch.tokens_BL[row, start : start + int(batch.response_lengths_B[row])].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama_untied", "gemma"])
def test_a_response_does_not_depend_on_its_batch(
    model_path: Callable[[str], str], kind: str
) -> None:
    engine = TransformersEngine.from_path(model_path(kind))
    asked = requests(24)
    together = engine.generate(asked, SETTINGS)
    backwards = engine.generate(asked[::-1], SETTINGS)
    for row, request in enumerate(asked):
        alone = engine.generate([request], SETTINGS)
        for other, place in ((together, row), (backwards, len(asked) - 1 - row)):
            assert alone.responses[0] == other.responses[place]
            assert response_tokens(alone, 0) == response_tokens(other, place)
            num = int(alone.response_lengths_B[0])
            np.testing.assert_allclose(
                alone.logprobs_BT[0, :num], other.logprobs_BT[place, :num], atol=1e-4
            )
    assert len(set(together.response_lengths_B.tolist())) > 3  # rows did leave at different times


def test_the_seed_alone_decides(engine: TransformersEngine) -> None:
    same = [GenerationRequest(PROMPTS[0], 5), GenerationRequest(PROMPTS[0], 5)]
    assert len(set(engine.generate(same, SETTINGS).responses)) == 1
    others = [GenerationRequest(PROMPTS[0], seed) for seed in range(8)]
    assert len(set(engine.generate(others, SETTINGS).responses)) > 4
    torch.manual_seed(1)
    again = engine.generate(others, SETTINGS).responses
    torch.manual_seed(2)
    assert engine.generate(others, SETTINGS).responses == again


@pytest.mark.parametrize("kind", ["gpt2", "llama_tied", "gemma2"])
def test_logprobs_equal_a_teacher_forced_forward(
    model_path: Callable[[str], str], kind: str
) -> None:
    engine = TransformersEngine.from_path(model_path(kind))
    batch = engine.generate(requests(9), SETTINGS)
    for row in range(9):
        start, num = int(batch.prompt_lengths_B[row]), int(batch.response_lengths_B[row])
        ids = torch.tensor(batch.tokens_BL[row, : start + num])
        with torch.no_grad():
            logits = engine.model(ids.unsqueeze(0)).logits[0, start - 1 : -1] / 0.9
        expected = torch.log_softmax(logits, -1).gather(1, ids[start:, None])[:, 0]
        np.testing.assert_allclose(batch.logprobs_BT[row, :num], expected, atol=1e-4)
        assert (batch.logprobs_BT[row, num:] == 0).all()
        assert (batch.tokens_BL[row, start + num :] == engine.tokenizer.pad_token_id).all()


def test_greedy_equals_plain_transformers(engine: TransformersEngine) -> None:
    batch = engine.generate(requests(3), dataclasses.replace(SETTINGS, temperature=0.0))
    for row in range(3):
        ids = torch.tensor(batch.tokens_BL[row : row + 1, : batch.prompt_lengths_B[row]])
        plain = engine.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        assert response_tokens(batch, row) == plain[0, ids.shape[1] :].tolist()


def test_a_response_ends_with_eos_or_is_truncated(engine: TransformersEngine) -> None:
    batch = engine.generate(requests(30), SETTINGS)
    eos = engine.tokenizer.eos_token_id
    for row in range(30):
        tokens = response_tokens(batch, row)
        assert eos not in tokens[:-1]
        assert bool(batch.truncated_B[row]) == (tokens[-1] != eos)
        assert len(tokens) == 12 or tokens[-1] == eos
        assert "<eos>" not in batch.responses[row]
        assert batch.responses[row].startswith(" ")
    assert 0 < batch.truncated_B.sum() < 30


def test_a_stop_string_ends_the_response_and_is_not_part_of_it(engine: TransformersEngine) -> None:
    stopping = dataclasses.replace(SETTINGS, stop=("\n\nHuman:", "\n\nAssistant:"))
    free, batch = engine.generate(requests(40), SETTINGS), engine.generate(requests(40), stopping)
    marks = engine.tokenizer.convert_tokens_to_ids(["Human:", "Assistant:"])
    met = 0
    for row in range(40):
        tokens, unbounded = response_tokens(batch, row), response_tokens(free, row)
        assert tokens == unbounded[: len(tokens)]
        assert "Human:" not in batch.responses[row]
        assert "Assistant:" not in batch.responses[row]
        assert not set(tokens[:-1]) & set(marks)
        if tokens[-1] in marks:
            met += 1
            assert not batch.truncated_B[row]
    assert met > 5


def test_a_stop_string_of_white_space_is_looked_for_as_it_is() -> None:
    assert SamplingSettings(1, stop=("\n\nHuman:", "\n\n")).stop_marks == ("Human:", "\n\n")


def test_a_long_prompt_keeps_its_end(engine: TransformersEngine) -> None:
    asked = [GenerationRequest(PROMPTS[2], 0), GenerationRequest(PROMPTS[0], 1)]
    batch = engine.generate(asked, dataclasses.replace(SETTINGS, max_prompt_tokens=4))
    whole = engine.tokenizer(PROMPTS[2])["input_ids"]
    assert batch.prompt_lengths_B.tolist() == [4, 3]
    assert batch.tokens_BL[0, :4].tolist() == whole[-4:]
    assert batch.prompts == (PROMPTS[2], PROMPTS[0])


def test_prompt_and_response_fit_the_models_positions(engine: TransformersEngine) -> None:
    long = GenerationRequest("\n\nHuman: " + "red " * 60 + "\n\nAssistant:", 3)
    batch = engine.generate([long], SETTINGS)
    assert batch.prompt_lengths_B[0] == 32 - 12
    with pytest.raises(ConfigError, match="32 new tokens leave no room for a prompt within the"):
        engine.generate([long], SamplingSettings(max_new_tokens=32))


def test_the_first_token_follows_the_models_distribution(engine: TransformersEngine) -> None:
    num = 4000
    asked = [GenerationRequest(PROMPTS[1], seed) for seed in range(num)]
    batch = engine.generate(asked, SamplingSettings(max_new_tokens=1))
    first = batch.tokens_BL[:, batch.prompt_lengths_B[0]]
    with torch.no_grad():
        logits = engine.model(torch.tensor([engine.tokenizer(PROMPTS[1])["input_ids"]])).logits
    shares = torch.softmax(logits[0, -1].double(), -1).numpy()
    counts = np.bincount(first, minlength=len(shares))
    chi_square = float(((counts - num * shares) ** 2 / (num * shares)).sum())
    assert chi_square < 30.0  # 10 degrees of freedom: exceeded once in a thousand


def choose(probabilities: Sequence[float], uniforms: Any, temperature: float) -> tuple[Any, Any]:
    logits = torch.tensor([probabilities]).log().expand(len(uniforms), -1)
    return _choose(logits, torch.as_tensor(uniforms), temperature)


def test_inverse_cdf_sampling_of_a_known_distribution() -> None:
    grid = (np.arange(1000) + 0.5) / 1000
    tokens, logprobs = choose([0.5, 0.3, 0.2], grid, 1.0)
    assert torch.bincount(tokens).tolist() == [500, 300, 200]
    assert tokens.tolist() == sorted(tokens.tolist())
    torch.testing.assert_close(logprobs, torch.tensor([0.5, 0.3, 0.2]).log()[tokens])


def test_temperature_sharpens_the_distribution_it_reports() -> None:
    # squares 0.25, 0.09, 0.04 over 0.38
    grid = (np.arange(380) + 0.5) / 380
    tokens, logprobs = choose([0.5, 0.3, 0.2], grid, 0.5)
    assert torch.bincount(tokens).tolist() == [250, 90, 40]
    torch.testing.assert_close(logprobs[0].exp(), torch.tensor(0.25 / 0.38))


def test_temperature_zero_is_greedy_whatever_the_number() -> None:
    tokens, logprobs = choose([0.2, 0.5, 0.3], [0.0, 0.5, 0.999], 0.0)
    assert tokens.tolist() == [1, 1, 1]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.5, 0.5]))


def test_an_impossible_token_is_never_chosen() -> None:
    edge = [0.0, np.nextafter(1.0, 0.0)]
    tokens, logprobs = choose([0.0, 0.5, 0.5, 0.0], edge, 1.0)
    assert tokens.tolist() == [1, 2]
    assert bool(torch.isfinite(logprobs).all())


def test_loaded_weights_are_a_copy_and_carry_their_version(engine: TransformersEngine) -> None:
    name, parameter = next(iter(engine.model.named_parameters()))
    source = np.full(tuple(parameter.shape), 0.5, dtype=np.float32)
    source.flags.writeable = False
    engine.load_weights({name: source}, version=7)
    assert bool((parameter == 0.5).all())
    source.flags.writeable = True
    source[:] = 9.0
    assert bool((parameter == 0.5).all())
    assert engine.policy_version == 7
    assert engine.generate(requests(1), SETTINGS).policy_version == 7


def test_an_unknown_weight_is_an_error_and_changes_nothing(engine: TransformersEngine) -> None:
    name, parameter = next(iter(engine.model.named_parameters()))
    before = parameter.detach().clone()
    weights = {name: np.zeros(tuple(parameter.shape), dtype=np.float32), "no.such": np.zeros(1)}
    with pytest.raises(KeyError, match=r"'no.such' is not a parameter of the rollout model"):
        engine.load_weights(weights, version=1)
    assert torch.equal(parameter, before)
    assert engine.policy_version == 0
