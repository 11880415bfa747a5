"""Of every topology: a score depends on its text alone, however texts are batched, cut and computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.errors import ArtifactError
from morlaif_ray.preference import AdapterBank, PreferenceModel
from tests.unit.preference.topology_models import (
    COLOURS,
    HEADS,
    KINDS,
    LORA,
    TEXTS,
    Backbone,
    adapter_folders,
    branched,
    opinionated,
    text_of,
)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_heads_that_the_weights_do_not_have_are_refused(
    backbone: Backbone, tmp_path: Path, lora: LoraConfig | None
) -> None:
    model = PreferenceModel.from_backbone(backbone(), HEADS, max_length=24, seed=5, lora=lora)
    model.save(tmp_path)
    path = tmp_path / "preference_model.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(card | {"heads": ["empathy", "detail"]}), encoding="utf-8")
    with pytest.raises(
        ArtifactError, match=r"names 2 heads \(empathy, detail\), the weights hold 3; take both"
    ):
        PreferenceModel.load(tmp_path)


@pytest.fixture(scope="module")
def scorers(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Topology -> function (texts, batch size, token limit, pad token) -> scores [B, 3]."""
    torch.set_num_threads(1)
    trunk = opinionated(PreferenceModel.from_backbone(backbone(), HEADS, max_length=24, seed=5), 3)
    late = branched(backbone("llama"))
    bank = AdapterBank.load(adapter_folders(backbone(), tmp_path_factory.mktemp("bank")))

    def of_model(model: PreferenceModel) -> Any:
        def score(texts: list[str], size: int, limit: int | None, pad: str) -> np.ndarray:
            model.tokenizer.pad_token = pad
            return model.score_heads(texts, batch_size=size, max_tokens=limit)

        return score

    def of_bank(texts: list[str], size: int, limit: int | None, pad: str) -> np.ndarray:
        bank.tokenizer.pad_token = pad
        found = bank.score_folders(texts, batch_size=size, max_tokens=limit)
        return np.concatenate(list(found.values()), axis=1)

    return {"shared_trunk": of_model(trunk), "late_branching": of_model(late), "adapters": of_bank}


@pytest.mark.parametrize("topology", ["shared_trunk", "late_branching", "adapters"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    size=st.integers(1, 9),
    limit=st.none() | st.integers(1, 120),
    pad=st.sampled_from(["<pad>", "<eos>", "red"]),
)
def test_a_score_depends_on_its_text_alone(
    scorers: dict[str, Any],
    topology: str,
    lengths: list[int],
    size: int,
    limit: int | None,
    pad: str,
) -> None:
    score = scorers[topology]
    texts = [text_of(length) for length in lengths]
    found = score(texts, size, limit, pad)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(found[row], score([text], 1, None, "<pad>")[0], atol=1e-5)


@given(words=st.lists(st.sampled_from(COLOURS), max_size=60), limit=st.integers(1, 40))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_many_texts_are_encoded_like_one_and_keep_their_end(
    tokenizer: Any, words: list[str], limit: int
) -> None:
    from morlaif_ray.backbone import encode_scored_text, encode_scored_texts

    texts = [" ".join(words), "red"]
    together = encode_scored_texts(tokenizer, texts, limit)
    assert together == [encode_scored_text(tokenizer, text, limit) for text in texts]
    kept = words[max(0, len(words) - (limit - 1)) :]
    assert together[0] == [*tokenizer.convert_tokens_to_ids(kept), tokenizer.eos_token_id]


@pytest.mark.parametrize("topology", ["shared_trunk", "late_branching"])
def test_a_token_limit_changes_neither_scores_nor_gradients_of_a_training_step(
    backbone: Backbone, topology: str
) -> None:
    gradients = []
    for limit in (None, 40):
        model = PreferenceModel.from_backbone(
            backbone(), HEADS, max_length=24, seed=5, topology=topology
        )
        opinionated(model, 1).tokens_per_batch = limit
        scores = model.forward(model.encode(TEXTS))
        (scores**2).sum().backward()
        gradients.append(
            (scores.detach().numpy(), [p.grad.numpy() for p in model.model.parameters()])
        )
    np.testing.assert_allclose(gradients[0][0], gradients[1][0], atol=1e-5)
    for whole, split in zip(gradients[0][1], gradients[1][1], strict=True):
        np.testing.assert_allclose(split, whole, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_last_block_at_the_end_alone_gives_the_same_scores_and_gradients(
    backbone: Backbone, kind: str, lora: LoraConfig | None
) -> None:
    model = opinionated(
        PreferenceModel.from_backbone(backbone(kind), HEADS, max_length=24, seed=5, lora=lora), 1
    )
    results = []
    names = set(model.model.state_dict())
    for model.last_block_at_end in (False, True):
        model.model.zero_grad()
        scores = model.forward(model.encode(TEXTS))
        scores.tanh().sum().backward()
        gradients = [p.grad.numpy().copy() for p in model.model.parameters() if p.grad is not None]
        results.append((scores.detach().numpy(), gradients))
    (whole, expected), (short, found) = results
    np.testing.assert_allclose(short, whole, atol=1e-5)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)
    assert set(model.model.state_dict()) == names


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_without_padding_are_those_of_padded_rows(
    backbone: Backbone, kind: str, shortcut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opinionated(
        PreferenceModel.from_backbone(backbone(kind), HEADS, max_length=24, seed=5), 1
    )
    model.last_block_at_end = shortcut
    seen: list[tuple[int, ...]] = []
    model.model.base_model.register_forward_hook(
        lambda _, __, kwargs, ___: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    padded = model.forward(model.encode(TEXTS)).detach().numpy()
    rows = len(TEXTS)
    num_tokens = sum(len(ids) for ids in model.encode(TEXTS))
    np.testing.assert_allclose(model.raw_scores(TEXTS), padded, atol=1e-5)
    np.testing.assert_allclose(model.raw_scores(TEXTS, [1])[:, 0], padded[:, 1], atol=1e-5)
    assert seen[1:] == [(1, num_tokens)] * 2
    # A pass of rows with a gradient, as in training, is what it was before.
    np.testing.assert_array_equal(model.forward(model.encode(TEXTS)).detach().numpy(), padded)
    assert seen[3] == seen[0]
    assert seen[0][0] == rows
    monkeypatch.setattr("morlaif_ray.preference.model.PACKED_TOKENS", 1)
    np.testing.assert_allclose(model.raw_scores(TEXTS), padded, atol=1e-5)
    assert len(seen) == 4 + rows


def test_a_block_of_unknown_arithmetic_is_computed_whole(backbone: Backbone) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    class Other(GPT2Block):
        pass

    model = PreferenceModel.from_backbone(backbone(), HEADS, max_length=24, seed=5)
    whole = model.score_heads(TEXTS)
    model.model.transformer.h[-1].__class__ = Other
    model.last_block_at_end = True
    np.testing.assert_array_equal(model.score_heads(TEXTS), whole)
