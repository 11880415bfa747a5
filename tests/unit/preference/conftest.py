"""A tiny causal LM to build preference models on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer, save_pretrained
from morlaif_ray.config.inputs import ScratchModel
from tests.opinions import give_opinions


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    words = "Human: Assistant: good bad red green blue sun moon star"
    return build_word_tokenizer([words], vocabulary_size=50, max_length=24)


@pytest.fixture(scope="session")
def backbone(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`backbone("gpt2", dropout=0.1)`: folder of a saved causal LM."""
    root = tmp_path_factory.mktemp("backbones")

    def make(kind: str = "gpt2", dropout: float = 0.0) -> str:
        folder: Path = root / f"{kind}_{dropout}"
        if folder.exists():
            return str(folder)
        if kind == "gpt2":
            size = ScratchModel(width=16, num_layers=2, num_heads=2, max_length=24)
            model = build_scratch_model(size, tokenizer, seed=1)
            for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
                setattr(model.config, name, dropout)
        else:
            from transformers import (
                GemmaConfig,
                GemmaForCausalLM,
                LlamaConfig,
                LlamaForCausalLM,
            )

            classes = {
                "llama": (LlamaConfig, LlamaForCausalLM),
                "gemma": (GemmaConfig, GemmaForCausalLM),
            }
            config_class, model_class = classes[kind]
            torch.manual_seed(1)
            extra = {"head_dim": 8, "num_key_value_heads": 1} if kind == "gemma" else {}
            settings = config_class(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=24,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **extra,
            )
            model = model_class(settings)
        save_pretrained(give_opinions(model), tokenizer, folder)
        return str(folder)

    return make
