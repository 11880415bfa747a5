"""A tiny causal LM for the tests of preference models in actors."""

from __future__ import annotations

import pytest
import torch

from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer, save_pretrained
from morlaif_ray.config.inputs import ScratchModel


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = build_word_tokenizer(
        ["Human: Assistant: good bad red sun moon"], vocabulary_size=50, max_length=24
    )
    size = ScratchModel(width=16, num_layers=2, num_heads=2, max_length=24)
    save_pretrained(build_scratch_model(size, tokenizer, seed=1), tokenizer, folder)
    return str(folder)
