"""A preference model scored by vLLM, without vLLM: what is refused, what the engine is asked for, what it answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer, save_pretrained
from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.errors import ArtifactError, ConfigError, NumericalError
from morlaif_ray.preference import PreferenceModel, vllm_pooling
from morlaif_ray.preference.vllm_pooling import PooledPreferenceModel, PoolingSettings
from morlaif_ray.vllm_environment import kv_bytes_per_token, pooling_cache_bytes

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]
HEADS = ("empathy", "detail", "bias")
TEXTS = [f"\n\nHuman: {'red ' * (5 * i)}sun\n\nAssistant: good" for i in range(7)]


class FakeEngine:
    """vLLM's classifier as far as it is used here, computed by transformers; remembers what it was asked for."""

    def __init__(self, model: str, **options: Any) -> None:
        self.model = PreferenceModel.load(model)
        self.options = options

    def classify(self, prompts: Any, *, pooling_params: Any, use_tqdm: bool) -> list[Any]:
        assert pooling_params.use_activation is False
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        with torch.no_grad():
            scores = self.model.forward(rows).tolist()
        return [SimpleNamespace(outputs=SimpleNamespace(probs=row)) for row in scores]


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    """A trunk with attention heads of 32 columns, which vLLM takes on a CPU."""
    tokenizer = build_word_tokenizer(
        ["Human: Assistant: good red sun"], vocabulary_size=50, max_length=24
    )
    size = ScratchModel(width=64, num_layers=2, num_heads=2, max_length=24)
    save_pretrained(build_scratch_model(size, tokenizer, seed=1), tokenizer, tmp_path / "lm")
    model = PreferenceModel.from_backbone(str(tmp_path / "lm"), HEADS, max_length=20, seed=5)
    torch.nn.init.normal_(model.model.score.weight, std=0.2)
    model.save(tmp_path / "trunk")
    return tmp_path / "trunk"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    fake = ModuleType("vllm")
    fake.LLM = FakeEngine  # type: ignore[attr-defined]
    fake.PoolingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(vllm_pooling, "require_vllm", lambda key: None)
    monkeypatch.setattr(vllm_pooling, "prepare_vllm_environment", lambda: None)
    return FakeEngine


@pytest.mark.usefixtures("engine")
def test_the_engine_gets_the_folders_tokens_and_its_logits_are_the_scores(trunk: Path) -> None:
    expected = PreferenceModel.load(trunk).score_heads(TEXTS)
    pooled = PooledPreferenceModel(trunk, PoolingSettings(max_num_seqs=8, max_tokens=5))
    assert pooled.heads == HEADS
    np.testing.assert_allclose(pooled.score_heads(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(pooled.raw_scores(TEXTS, [2, 0]), expected[:, [2, 0]], atol=1e-5)
    assert pooled.raw_scores([], [1]).shape == (0, 1)
    asked = pooled._llm.options
    assert asked["max_model_len"] == 20
    assert asked["max_num_batched_tokens"] == 20  # a text fits
    assert asked["enable_chunked_prefill"] is False
    assert asked["kv_cache_memory_bytes"] == 256 << 20
    assert asked["load_format"] == "safetensors"
    assert asked["enable_prefix_caching"] is asked["trust_remote_code"] is False
    assert "gpu_memory_utilization" not in asked


@pytest.mark.usefixtures("engine")
def test_a_score_that_is_not_finite_is_named(trunk: Path) -> None:
    pooled = PooledPreferenceModel(trunk)
    with torch.no_grad():
        pooled._llm.model.model.score.weight[1] = float("inf")
    with pytest.raises(
        NumericalError, match=r"^preference model 'detail' gave a non-finite score for text 0$"
    ):
        pooled.score_heads(TEXTS)
    assert np.isfinite(pooled.raw_scores(TEXTS, [0, 2])).all()


@pytest.mark.usefixtures("engine")
def test_after_a_call_that_failed_there_are_no_more_scores(
    trunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled = PooledPreferenceModel(trunk)

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no memory left\nat all")

    with monkeypatch.context() as patched:
        patched.setattr(pooled._llm, "classify", fail)
        with pytest.raises(RuntimeError, match="no memory left"):
            pooled.raw_scores(TEXTS)
    with pytest.raises(RuntimeError, match=r"^vLLM failed before: no memory left$"):
        pooled.raw_scores(TEXTS)


@pytest.mark.usefixtures("engine")
def test_answers_of_other_texts_are_no_scores(trunk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pooled = PooledPreferenceModel(trunk)
    answers = pooled._llm.classify
    monkeypatch.setattr(
        pooled._llm, "classify", lambda prompts, **options: answers(prompts * 2, **options)
    )
    with pytest.raises(RuntimeError, match=r"^vLLM gave 14 scores for 7 texts$"):
        pooled.raw_scores(TEXTS)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"adapter": True, "backbone": "gpt2"}, "an adapter"),
        ({"branch_blocks": 1}, "a model with branches"),
        ({"encoder_head": ["classifier.weight"], "template": "dialogue-encoder-v1"}, "an encoder"),
    ],
)
def test_what_is_no_whole_decoder_is_refused_before_anything_loads(
    tmp_path: Path, change: dict[str, Any], kind: str
) -> None:
    card = {"heads": ["a"], "max_length": 9, "template": "dialogue-eos-v1", "dtype": "float32"}
    card |= {"adapter": False, "backbone": None, **change}
    (tmp_path / "preference_model.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(
        ConfigError,
        match=rf"engine is 'vllm', which scores whole decoders, and this is {kind}; write pref",
    ):
        PooledPreferenceModel(tmp_path)


def test_without_vllm_the_other_engine_is_named(
    trunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"^preference\.engine is 'vllm', but vLLM is not installed on this node; .*, or "
        r"write preference\.engine: transformers$",
    ):
        PooledPreferenceModel(trunk)


@pytest.mark.usefixtures("engine")
def test_weights_with_other_heads_and_attention_without_a_kernel_are_refused(
    trunk: Path, backbone: Callable[..., str], tmp_path: Path
) -> None:
    model = PreferenceModel.from_backbone(backbone(), HEADS, max_length=24, seed=5)
    model.save(tmp_path / "narrow")
    with pytest.raises(
        ConfigError, match=r"narrow: .*on CPU has no attention for heads of 8; choose"
    ):
        PooledPreferenceModel(tmp_path / "narrow")
    path = trunk / "preference_model.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**card, "heads": ["empathy"]}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="names 1 heads \\(empathy\\), the weights hold 3"):
        PooledPreferenceModel(trunk)


def test_what_vllm_says_at_its_start_is_one_line_with_the_way_out(
    trunk: Path, engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, model: str, **options: Any) -> None:
        raise ValueError("1 validation error for ModelConfig\n  Value error, no such class\n more")

    monkeypatch.setattr(engine, "__init__", fail)
    with pytest.raises(
        ConfigError,
        match=r"trunk: vLLM cannot score this preference model \(Value error, no such class\); "
        r"write preference\.engine: transformers$",
    ):
        PooledPreferenceModel(trunk)


def test_the_cache_holds_one_text_of_full_length_whatever_the_default() -> None:
    llama = SimpleNamespace(
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096
    )
    per_token = kv_bytes_per_token(llama, 2)
    assert per_token == 2 * 32 * 8 * 128 * 2
    assert pooling_cache_bytes(None, 512, per_token, on_gpu=False) == 256 << 20
    # 4,096 tokens are 32 blocks of 128, and one is vLLM's own
    assert pooling_cache_bytes(None, 4096, per_token, on_gpu=False) == 33 * 128 * per_token
    assert pooling_cache_bytes(None, 4096, per_token, on_gpu=True) == 2048 << 20
    assert pooling_cache_bytes(64, 4096, per_token, on_gpu=True) == 64 << 20
