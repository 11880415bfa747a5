"""Encoders (BERT, RoBERTa, DistilBERT, DeBERTa, ELECTRA, ModernBERT) as trunks of preference models.

A decoder's score is read at its last token; an encoder's where its own sequence-classification class reads it ([CLS],
with a pooler where there is one), so plain transformers gives the same score. What turns the trunk's states into
scores, pooler included, is the score head: trained in full beside adapters and saved with them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from morlaif_ray.errors import ConfigError

TEMPLATE = "dialogue-encoder-v1"
"""[CLS], the end of the dialogue, [SEP]."""
POOLER = "pooler"
FRESH = (
    "classifier.",
    "pre_classifier.",
    "head.",
    "pooler.",
    *(f"{trunk}.pooler." for trunk in ("bert", "albert", "mobilebert", "longformer", "roberta")),
    # Of kinds that are refused once they are loaded, in words that help.
    "classification_head.",
    "logits_proj.",
    "sequence_summary.",
)
"""Beginnings of the weights that a backbone may lack: those of score heads."""
OUTPUTS = ("classifier", "classifier.out_proj")
"""Last layer of a head, of BERT and of RoBERTa."""


def is_encoder(classifier: Any) -> bool:
    """False for a decoder with its linear `score`; ConfigError for a classifier that is neither."""
    if isinstance(getattr(classifier, "score", None), nn.Module):
        return False
    if classifier.config.is_encoder_decoder or not hasattr(classifier, "classifier"):
        raise ConfigError(
            f"preference.backbone: {type(classifier).__name__} cannot be a preference model; use a decoder (GPT-2, "
            f"Llama, Gemma and their like) or an encoder (BERT, RoBERTa, DeBERTa and their like)"
        )
    return True


def head_modules(classifier: Any) -> list[str]:
    """Names of the modules that turn an encoder's states into scores: what is not the trunk, and the trunk's pooler."""
    trunk = classifier.base_model_prefix
    names = [
        name
        for name, module in classifier.named_children()
        if name != trunk and next(module.parameters(), None) is not None
    ]
    if getattr(classifier.base_model, POOLER, None) is not None:
        names.append(f"{trunk}.{POOLER}")
    return sorted(names)


def head_tensors(classifier: Any) -> list[str]:
    """Names of the head's tensors in a classifier without adapters; below adapters, as if there were none."""
    own = tuple(f"{name}." for name in head_modules(classifier))
    names = (
        name.replace(".modules_to_save.default", "")
        for name, _ in classifier.named_parameters()
        if ".original_module." not in name
    )
    return sorted(name for name in names if name.startswith(own))


def num_positions(classifier: Any) -> int | None:
    """Tokens that fit; None where the config sets no limit. RoBERTa's positions begin after its padding index."""
    limit: int | None = getattr(classifier.config, "max_position_embeddings", None)
    if limit is None:
        return None
    for name, module in classifier.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return limit if module.padding_idx is None else limit - module.padding_idx - 1
    return limit
