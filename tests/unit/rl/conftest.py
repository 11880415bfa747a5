"""Tiny models made on the spot, and rollout batches with known shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer, save_pretrained
from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.types import RolloutBatch
from tests.opinions import give_opinions

WORDS = "Human: Assistant: red green blue sun moon star"
MAX_LENGTH = 32


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Eleven tokens: pad 0, eos 1, unk 2, then the words."""
    return build_word_tokenizer([WORDS], vocabulary_size=50, max_length=MAX_LENGTH)


def _decoder_settings(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _make_model(kind: str, tokenizer: Any) -> Any:
    import transformers as hf

    if kind.startswith("gpt2"):
        size = ScratchModel(width=16, num_layers=2, num_heads=2, max_length=MAX_LENGTH)
        model = build_scratch_model(size, tokenizer, seed=3)
        if kind == "gpt2_dropout":
            for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
                setattr(model.config, name, 0.3)
        return model
    settings = _decoder_settings(tokenizer)
    torch.manual_seed(3)
    if kind == "llama_tied":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**settings, tie_word_embeddings=True))
    if kind == "llama_untied":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**settings, tie_word_embeddings=False))
    if kind == "gemma":
        return hf.GemmaForCausalLM(hf.GemmaConfig(**settings))
    assert kind == "gemma2"
    # A cap this low bends every logit, so leaving it out would show.
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**settings, final_logit_softcapping=0.5))


@pytest.fixture(scope="session")
def model_path(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`model_path("gpt2")`: a saved model folder, made once. Weights are wide enough to have opinions."""
    root = tmp_path_factory.mktemp("models")

    def make(kind: str) -> str:
        folder: Path = root / kind
        if not folder.exists():
            model = _make_model(kind, tokenizer)
            save_pretrained(give_opinions(model), tokenizer, folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def gpt2(model_path: Callable[[str], str]) -> str:
    return model_path("gpt2")


def make_batch(seed: int, num: int = 6, longest: int = 7) -> RolloutBatch:
    """Random tokens; prompts and responses of different lengths, one response of one token."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(2, 6, num)
    lengths = rng.integers(2, longest + 1, num)
    lengths[0], lengths[1] = 1, longest
    tokens = np.zeros((num, int((prompt_lengths + lengths).max())), dtype=np.int64)
    logprobs = np.zeros((num, longest), dtype=np.float32)
    for row in range(num):
        size = prompt_lengths[row] + lengths[row]
        tokens[row, :size] = rng.integers(1, 11, size)
        logprobs[row, : lengths[row]] = -rng.random(lengths[row])
    return RolloutBatch(
        prompts=("",) * num,
        responses=("",) * num,
        tokens_BL=tokens,
        prompt_lengths_B=prompt_lengths,
        response_lengths_B=lengths,
        logprobs_BT=logprobs,
        truncated_B=np.arange(num) % 2 == 0,
        policy_version=0,
    )


@pytest.fixture(scope="session")
def batch() -> Callable[..., RolloutBatch]:
    return make_batch
