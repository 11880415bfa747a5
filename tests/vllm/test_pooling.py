"""Preference models scored by the real vLLM engine: the scores of transformers, whatever shares a pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from actors.preference_model import PreferenceModelActor
from morlaif_ray.errors import ConfigError, NumericalError
from morlaif_ray.preference import PreferenceModel
from morlaif_ray.preference.vllm_pooling import PooledPreferenceModel, PoolingSettings
from tests.vllm.tiny_models import WORDS, make_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
SETTINGS = PoolingSettings(max_num_seqs=8, max_tokens=100, kv_cache_mb=32)
EXACT = 1e-5
MAX_LENGTH = 48


def dialogues(num: int) -> list[str]:
    """Of 4 to 90 words: some longer than the models read."""
    rng, words = np.random.default_rng(0), WORDS.split()[2:]
    lengths = rng.integers(1, 87, num)
    return [
        f"\n\nHuman: {' '.join(rng.choice(words, length))}\n\nAssistant: moon" for length in lengths
    ]


TEXTS = dialogues(30)


@dataclass(frozen=True)
class Pair:
    """An engine with the model that it was made from."""

    pooled: PooledPreferenceModel
    model: PreferenceModel
    folder: Path


def save_model(kind: str, heads: tuple[str, ...], folder: Path) -> PreferenceModel:
    make_model(kind, folder / "backbone")
    model = PreferenceModel.from_backbone(
        str(folder / "backbone"), heads, max_length=MAX_LENGTH, seed=5
    )
    torch.nn.init.normal_(model.model.score.weight, std=0.2)
    model.save(folder / "pm")
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    """Two engines at once in one process, as with `panel_placement: one_actor`."""
    found = {}
    for kind, heads in (("gpt2", ("empathy", "detail", "bias")), ("llama", ("wit",))):
        folder = tmp_path_factory.mktemp(kind)
        model = save_model(kind, heads, folder)
        pooled = PooledPreferenceModel(folder / "pm", SETTINGS)
        found[kind] = Pair(pooled, model, folder / "pm")
    yield found
    for pair in found.values():
        pair.pooled.close()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scores_are_those_of_transformers_in_head_order(pairs: dict[str, Pair], kind: str) -> None:
    pooled, model = pairs[kind].pooled, pairs[kind].model
    assert max(map(len, model.encode(TEXTS))) == MAX_LENGTH
    expected = model.score_heads(TEXTS)
    assert expected.std(axis=0).min() > 100 * EXACT  # the check would see a wrong one
    scores = pooled.score_heads(TEXTS)
    np.testing.assert_allclose(scores, expected, atol=EXACT)
    assert pooled.heads == model.heads
    last = len(model.heads) - 1
    np.testing.assert_allclose(pooled.raw_scores(TEXTS, [last]), expected[:, [last]], atol=EXACT)


def test_a_score_depends_on_its_text_alone(pairs: dict[str, Pair]) -> None:
    pooled = pairs["gpt2"].pooled
    together = pooled.score_heads(TEXTS)
    np.testing.assert_allclose(pooled.score_heads(TEXTS[::-1])[::-1], together, atol=EXACT)
    for row in (0, 7, 19):
        np.testing.assert_allclose(pooled.score_heads([TEXTS[row]])[0], together[row], atol=EXACT)


def test_the_panels_actor_scores_the_wanted_heads_of_its_folders(pairs: dict[str, Pair]) -> None:
    folder = str(pairs["gpt2"].folder)
    names = {folder: {0: "empathy", 2: "bias"}}
    actor = PreferenceModelActor([folder], 8, heads=names, vllm=SETTINGS)
    assert actor.ping() == 1
    scores = actor.score(TEXTS, {folder: [2, 0]})[folder]
    expected = pairs["gpt2"].model.score_heads(TEXTS)[:, [2, 0]]
    np.testing.assert_allclose(scores, expected, atol=EXACT)
    assert actor.score(TEXTS[:2])[folder].shape == (2, 3)
    assert psutil.Process().children() == []


def test_a_damaged_folder_and_a_score_that_is_not_finite_are_one_line(
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    model = save_model("gpt2", ("empathy", "detail"), tmp_path)
    with torch.no_grad():
        model.model.score.weight[1] = float("inf")
    model.save(tmp_path / "pm")
    pooled = PooledPreferenceModel(tmp_path / "pm", SETTINGS)
    with pytest.raises(NumericalError, match="'detail' gave a non-finite score for text 0"):
        pooled.score_heads(TEXTS)
    pooled.close()
    weights = tmp_path / "pm" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["score.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"pm: vLLM cannot score this .*; write preference\.eng"):
        PooledPreferenceModel(tmp_path / "pm", SETTINGS)
