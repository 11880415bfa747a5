"""Untrained models of every topology with opinions of their own, and texts to score, for the tests of topologies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.preference import PreferenceModel

COLOURS = ("red", "green", "blue", "sun", "moon", "star")
HEADS = ("empathy", "detail", "bias")
LORA = LoraConfig(rank=2)
KINDS = ("gpt2", "llama", "gemma")
Backbone = Callable[..., str]


def text_of(num_words: int) -> str:
    words = " ".join(COLOURS[i % 6] for i in range(num_words))
    return f"\n\nHuman: {words}\n\nAssistant: {COLOURS[num_words % 6]} good"


TEXTS = [text_of(n) for n in (1, 9, 3, 14, 5, 2, 7, 40)]


def opinionated(model: PreferenceModel, seed: int) -> PreferenceModel:
    """Moves everything that trains: fresh heads and adapters have next to no effect, fresh branches are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if parameter.requires_grad:
                scale = 1.0 if "score" in name else 0.05 if "lora_" in name else 0.3
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.model.eval()
    return model


def branched(path: str, heads: tuple[str, ...] = HEADS, blocks: int = 1) -> PreferenceModel:
    model = PreferenceModel.from_backbone(
        path, heads, max_length=24, seed=5, topology="late_branching", branch_blocks=blocks
    )
    return opinionated(model, 1)


def adapter_folders(path: str, root: Path, topology: str = "adapters") -> list[str]:
    folders = []
    for index, name in enumerate(HEADS):
        model = PreferenceModel.from_backbone(
            path, [name], max_length=24, seed=5, lora=LORA, topology=topology, branch_blocks=None
        )
        opinionated(model, index).save(root / name)
        folders.append(str(root / name))
    return folders


def plain_scores(model: Any, tokenizer: Any, text: str) -> np.ndarray:
    """The way a stranger scores: transformers' own tokenizer, EOS at the end, the classifier's logits."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()
