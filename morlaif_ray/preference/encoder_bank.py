"""A bank of adapters on one encoder: the trunk once on K*B rows, then each adapter's own score head on its rows.

Legend: B texts, K adapters, H heads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from morlaif_ray.backbone import encode_framed_texts, load_tokenizer, load_whole
from morlaif_ray.cpu_products import fast_products
from morlaif_ray.errors import ArtifactError
from morlaif_ray.preference import encoders
from morlaif_ray.preference.adapters import AdapterBank, read_adapter, stack
from morlaif_ray.preference.batching import padded
from morlaif_ray.preference.saved import Card, check_backbone
from morlaif_ray.preference.stacked import Chosen

ROWS_BY_ADAPTER = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
"""`model_type`s all of whose layers see rows in the order of the batch. Others (DeBERTa projects its table of relative
positions, too) go through the bank an adapter at a time."""


class FannedModule(nn.Module):
    """K modules in the place of one: each gets the rows of its adapter."""

    def __init__(self, modules: Sequence[nn.Module], chosen: Chosen) -> None:
        super().__init__()
        self.own = nn.ModuleList(modules)
        self._chosen = chosen

    def forward(self, rows: Tensor) -> Tensor:
        parts = rows.chunk(len(self._chosen.rows))
        return torch.cat(
            [self.own[index](part) for index, part in zip(self._chosen.rows, parts, strict=True)]
        )


class EncoderBank(AdapterBank):
    """`AdapterBank.load` returns it where the adapters' backbone is an encoder."""

    @classmethod
    def of(cls, cards: Mapping[str, Card]) -> EncoderBank:
        """Loads adapter folders whose cards agree; ArtifactError where they differ in heads or do not fit."""
        from transformers import AutoModelForSequenceClassification

        first, card = next(iter(cards.items()))
        for folder, other in cards.items():
            if len(other.heads) != len(card.heads):
                raise ArtifactError(
                    f"{folder}: {len(other.heads)} heads, {first} has {len(card.heads)}; adapters of one encoder need "
                    f"as many heads each"
                )
        classifier = load_whole(
            AutoModelForSequenceClassification,
            str(card.backbone),
            "backbone",
            fresh=encoders.FRESH,
            dtype=getattr(torch, card.dtype),
            num_labels=len(card.heads),
        )
        check_backbone(Path(first), card, classifier)
        tokenizer = load_tokenizer(first, encoders=True)
        parts = [read_adapter(Path(folder)) for folder in cards]
        chosen = Chosen(len(parts))
        _fan_out(classifier, [head for _, head in parts], chosen)
        stack(classifier, [layers for layers, _ in parts], list(cards), chosen)
        classifier.eval()
        return cls(classifier, tokenizer, cards, [], chosen, None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_framed_texts(self.tokenizer, texts, self.max_length)

    @torch.no_grad()
    @fast_products()
    def forward(self, ids: Sequence[Sequence[int]], folders: Sequence[str]) -> list[Tensor]:
        """Scores [B, H] per folder, in the order of `folders`."""
        names = list(self.cards)
        self._chosen.rows = [names.index(folder) for folder in folders]
        device = next(self.model.parameters()).device
        tokens_BL, mask_BL = padded(ids, self.tokenizer.pad_token_id, device)
        wanted = list(self._chosen.rows)
        together = self.model.config.model_type in ROWS_BY_ADAPTER
        found: list[Tensor] = []
        for rows in [wanted] if together else [[row] for row in wanted]:
            self._chosen.rows = rows
            logits: Tensor = self.model(
                input_ids=tokens_BL.repeat(len(rows), 1),
                attention_mask=mask_BL.repeat(len(rows), 1),
            ).logits.float()
            found.extend(logits.view(len(rows), len(ids), -1))
        return found


def _fan_out(classifier: Any, heads: Sequence[Mapping[str, Tensor]], chosen: Chosen) -> None:
    """Puts every adapter's own copy in the place of each module of the score head."""
    for place in encoders.head_modules(classifier):
        base = classifier.get_submodule(place)
        copies = []
        for tensors in heads:
            module = copy.deepcopy(base)
            module.load_state_dict(
                {
                    name.removeprefix(f"{place}."): value
                    for name, value in tensors.items()
                    if name.startswith(f"{place}.")
                }
            )
            copies.append(module)
        parent, _, own = place.rpartition(".")
        setattr(classifier.get_submodule(parent), own, FannedModule(copies, chosen))
