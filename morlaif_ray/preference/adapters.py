"""Many LoRA adapters on one backbone, scored in one batched pass.

The backbone is loaded once. The texts of a batch lie one behind another without padding (`packing.py`), once per
adapter, as many adapters at a time as a CPU's caches hold (`stacked.py`). What the adapters share is computed once: the
embeddings and the blocks below the first adapted one. Backbones whose attention is not known are padded instead, K*B
rows. Legend: B texts, K adapters, L tokens, I and O widths of a layer, R rank, D width, H heads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from morlaif_ray.backbone import encode_scored_texts, load_tokenizer, load_whole
from morlaif_ray.backbone.packing import can_pack, packed, use_packing
from morlaif_ray.cpu_products import fast_products
from morlaif_ray.errors import ArtifactError
from morlaif_ray.preference.batching import length_batches, padded
from morlaif_ray.preference.branching import HEAD, end_states, layout_of
from morlaif_ray.preference.saved import (
    ADAPTER_WEIGHTS,
    Card,
    check_adapter_files,
    check_backbone,
    read_card,
)
from morlaif_ray.preference.stacked import Chosen, PackedTail, StackedLora
from morlaif_ray.tensor_ops import last_true_index
from morlaif_ray.types import FloatArray

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in an adapter file."""


class AdapterBank:
    """Scores dialogues by all its adapters at once; the scores are those of each `PreferenceModel` alone."""

    def __init__(
        self,
        classifier: Any,
        tokenizer: Any,
        cards: Mapping[str, Card],
        heads: Sequence[Tensor],
        chosen: Chosen,
        tail: PackedTail | None,
    ) -> None:
        self.model = classifier
        self.tokenizer = tokenizer
        self.cards = dict(cards)
        self.max_length = next(iter(cards.values())).max_length
        self._heads = nn.ParameterList(nn.Parameter(head, requires_grad=False) for head in heads)
        classifier.bank_heads = self._heads  # so that `.to(device)` moves them, too
        self._chosen = chosen
        self._tail = tail

    @classmethod
    def load(cls, folders: Sequence[str | Path]) -> AdapterBank:
        """Loads adapter folders; ArtifactError where they do not share one backbone or a part is missing."""
        from transformers import AutoModelForSequenceClassification

        cards = {str(folder): read_card(Path(folder)) for folder in folders}
        first, card = next(iter(cards.items()))
        for folder, other in cards.items():
            if not other.adapter:
                raise ArtifactError(f"{folder}: full weights, not an adapter; score it on its own")
            if _basis(other) != _basis(card):
                raise ArtifactError(
                    f"{folder}: adapter of backbone {other.backbone}, max_length {other.max_length}; {first} has "
                    f"{card.backbone}, max_length {card.max_length}; a bank needs one backbone"
                )
            check_adapter_files(Path(folder), other)
        if card.encoder_head is not None:
            from morlaif_ray.preference.encoder_bank import EncoderBank

            return EncoderBank.of(cards)
        classifier = load_whole(
            AutoModelForSequenceClassification,
            str(card.backbone),
            "backbone",
            fresh=HEAD,
            dtype=getattr(torch, card.dtype),
            num_labels=1,
        )
        check_backbone(Path(first), card, classifier)
        tokenizer = load_tokenizer(first)
        classifier.config.pad_token_id = tokenizer.pad_token_id
        parts = [read_adapter(Path(folder)) for folder in cards]
        chosen = Chosen(len(parts))
        places = stack(classifier, [layers for layers, _ in parts], list(cards), chosen)
        tail = _pack(classifier, places, card.max_length, chosen)
        classifier.eval()
        heads = [head[f"{HEAD}.weight"] for _, head in parts]
        return cls(classifier, tokenizer, cards, heads, chosen, tail)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_scored_texts(self.tokenizer, texts, self.max_length)

    @torch.no_grad()
    @fast_products()
    def forward(self, ids: Sequence[Sequence[int]], folders: Sequence[str]) -> list[Tensor]:
        """Scores [B, H] per folder, in the order of `folders`."""
        names = list(self.cards)
        self._chosen.rows = [names.index(folder) for folder in folders]
        device = next(self.model.parameters()).device
        states_of = self._padded if self._tail is None else self._packed
        return [
            nn.functional.linear(state.to(self._heads[row].dtype), self._heads[row]).float()
            for row, state in zip(self._chosen.rows, states_of(ids, device), strict=True)
        ]

    def _packed(self, ids: Sequence[Sequence[int]], device: Any) -> list[Tensor]:
        assert self._tail is not None
        tokens_1T, positions_1T, self._tail.packing = packed(ids, device)
        self.model.base_model(
            input_ids=tokens_1T,
            position_ids=positions_1T,
            attention_mask=torch.ones_like(tokens_1T),  # else transformers warns of padding
            use_cache=False,
        )
        return self._tail.take()

    def _padded(self, ids: Sequence[Sequence[int]], device: Any) -> list[Tensor]:
        tokens_BL, mask_BL = padded(ids, self.tokenizer.pad_token_id, device)
        times = len(self._chosen.rows)
        state = end_states(
            self.model.base_model,
            tokens_BL.repeat(times, 1),
            mask_BL.repeat(times, 1),
            last_true_index(mask_BL.bool()).repeat(times),
            shortcut=True,
        )
        return list(state.view(times, len(ids), -1))

    def score_folders(
        self,
        texts: Sequence[str],
        folders: Sequence[str] | None = None,
        *,
        batch_size: int = 64,
        max_tokens: int | None = None,
    ) -> dict[str, FloatArray]:
        """Raw scores [B, H] of each wanted folder (default: all). Batches count texts and their tokens, not K times.

        A score may be non-finite: the caller says what that means.
        """
        wanted = list(self.cards) if folders is None else list(folders)
        ids = self.encode(texts)
        scores = {
            folder: np.empty((len(ids), len(self.cards[folder].heads)), dtype=np.float64)
            for folder in wanted
        }
        for rows in length_batches([len(row) for row in ids], batch_size, max_tokens):
            for folder, part in zip(
                wanted, self.forward([ids[i] for i in rows], wanted), strict=True
            ):
                scores[folder][rows] = part.cpu().numpy()
        return scores


def _basis(card: Card) -> tuple[Any, ...]:
    return card.backbone, card.backbone_fingerprint, card.max_length, card.dtype, card.template


def read_adapter(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """({module: (A [R, I], B [O, R] with the scaling in it)}, the score head's tensors) of a PEFT LoRA folder."""
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = settings["r"], settings["lora_alpha"]
    except (OSError, ValueError, KeyError):
        raise ArtifactError(f"{path}: missing or damaged; train the model again") from None
    unknown = [
        name
        for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_tie")
        if settings.get(name)
    ]
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none" or unknown:
        raise ArtifactError(
            f"{path}: only plain LoRA can be scored in a bank "
            f"(found {', '.join(unknown) or settings.get('peft_type')}); set preference.topology: separate"
        )
    scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    stored = load_file(folder / ADAPTER_WEIGHTS)
    heads = {
        name.removeprefix(PREFIX): value for name, value in stored.items() if ".lora_" not in name
    }
    down = _side(stored, "lora_A")
    up = _side(stored, "lora_B")
    card = read_card(folder)
    expected = {f"{HEAD}.weight"} if card.encoder_head is None else set(card.encoder_head)
    if set(down) != set(up) or set(heads) != expected or 2 * len(down) + len(heads) != len(stored):
        raise ArtifactError(
            f"{folder / ADAPTER_WEIGHTS}: tensors that no LoRA adapter with a score head has; train the model again"
        )
    return {name: (down[name], up[name] * scaling) for name in down}, heads


def _side(stored: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    ending = f".{side}.weight"
    return {
        name.removeprefix(PREFIX).removesuffix(ending): value
        for name, value in stored.items()
        if name.endswith(ending)
    }


def stack(
    classifier: Any,
    adapters: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
    folders: Sequence[str],
    chosen: Chosen,
) -> list[str]:
    """Puts a `StackedLora` where any adapter has a term (absent ones are 0); returns the module names."""
    places = sorted({name for layers in adapters for name in layers})
    for place in places:
        terms = [layers.get(place) for layers in adapters]
        present = [term for term in terms if term is not None]
        rank = max(len(down) for down, _ in present)
        dtype, width, out = present[0][0].dtype, present[0][0].shape[1], len(present[0][1])
        down_KIR = torch.zeros(len(terms), width, rank, dtype=dtype)
        up_KRO = torch.zeros(len(terms), rank, out, dtype=dtype)
        try:
            parent = classifier.get_submodule(place.rpartition(".")[0])
            base = parent.get_submodule(place.rpartition(".")[2])
            for row, term in enumerate(terms):
                if term is not None:
                    down_KIR[row, :, : len(term[0])] = term[0].T
                    up_KRO[row, : len(term[0])] = term[1].T
            probe = base(torch.zeros(1, 1, width, dtype=next(base.parameters()).dtype))
            if probe.shape[-1] != out:
                raise RuntimeError(f"{out} outputs, not {probe.shape[-1]}")
        except (AttributeError, RuntimeError) as error:
            cause = str(error).splitlines()[0]
            raise ArtifactError(
                f"{folders[0]}: layer '{place}' of the adapters does not fit the backbone ({cause})"
            ) from None
        setattr(parent, place.rpartition(".")[2], StackedLora(base, down_KIR, up_KRO, chosen))
    return places


def _pack(
    classifier: Any, places: Sequence[str], max_length: int, chosen: Chosen
) -> PackedTail | None:
    """A tail of all blocks that computes packed texts; None where the backbone's attention is not known to allow it."""
    if not can_pack(classifier.config, max_length):
        return None
    first = min(
        int(found.group(1)) for place in places if (found := re.search(r"\.(\d+)\.", place))
    )
    use_packing(classifier)
    base = classifier.base_model
    layout = layout_of(base)
    tail = PackedTail(list(getattr(base, layout.blocks)), getattr(base, layout.norm), first, chosen)
    setattr(base, layout.blocks, nn.ModuleList([tail]))
    setattr(base, layout.norm, nn.Identity())
    return tail
