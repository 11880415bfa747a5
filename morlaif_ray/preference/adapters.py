"""Many LoRA adapters on one backbone, scored in one batched pass.

The backbone is loaded once. A batch of B texts becomes K*B rows, adapter by adapter; every adapted linear layer adds
the K low-rank terms with two batched products, so the backbone's own products are K times larger and K times fewer.
Where the adapters begin above the first block, the blocks below them are computed once for all K.
Legend: B texts, K adapters, L tokens, I and O widths of a layer, R rank, D width, H heads.
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
from morlaif_ray.errors import ArtifactError
from morlaif_ray.preference.batching import length_batches, padded
from morlaif_ray.preference.branching import HEAD, Tail, end_states, layout_of
from morlaif_ray.preference.saved import (
    ADAPTER_WEIGHTS,
    Card,
    check_adapter_files,
    check_backbone,
    read_card,
)
from morlaif_ray.tensor_ops import last_true_index
from morlaif_ray.types import FloatArray

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in an adapter file."""


class Chosen:
    """The adapters of the pass under way, shared by all stacked layers of a bank."""

    def __init__(self, num_adapters: int) -> None:
        self.rows = list(range(num_adapters))


class StackedLora(nn.Module):
    """A linear layer whose input rows are K*B, adapter by adapter: x W + (x A_k) B_k in two batched products."""

    def __init__(self, base: nn.Module, down_KIR: Tensor, up_KRO: Tensor, chosen: Chosen) -> None:
        super().__init__()
        self.base = base
        self.down_KIR = nn.Parameter(down_KIR, requires_grad=False)
        self.up_KRO = nn.Parameter(up_KRO, requires_grad=False)
        self._chosen = chosen

    def forward(self, rows: Tensor) -> Tensor:
        plain: Tensor = self.base(rows)
        down_KIR: Tensor = self.down_KIR
        up_KRO: Tensor = self.up_KRO
        if self._chosen.rows != list(range(len(down_KIR))):  # fewer, or in another order
            down_KIR, up_KRO = down_KIR[self._chosen.rows], up_KRO[self._chosen.rows]
        num_adapters = len(down_KIR)
        # As PEFT does: a bfloat16 backbone under float32 adapters keeps the low-rank term in float32.
        inner = torch.bmm(
            rows.reshape(num_adapters, -1, rows.shape[-1]).to(down_KIR.dtype), down_KIR
        )
        flat = plain.reshape(num_adapters, -1, plain.shape[-1])
        if flat.dtype == up_KRO.dtype:
            return torch.baddbmm(flat, inner, up_KRO).view(plain.shape)
        return flat.add(torch.bmm(inner, up_KRO).to(flat.dtype)).view(plain.shape)


class TiledTail(Tail):
    """The blocks from the first adapted one on: rows and their arguments are repeated K times here, once."""

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module, chosen: Chosen) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self._chosen = chosen

    def forward(self, hidden_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        times, batch = len(self._chosen.rows), len(hidden_BLD)
        rows = hidden_BLD.repeat(times, 1, 1)
        tiled_args = [_tiled(value, batch, times) for value in args]
        tiled_kwargs = {name: _tiled(value, batch, times) for name, value in kwargs.items()}
        last = self.last_B.repeat(times)
        states = self.norm(self.run(list(self.blocks), rows, last, *tiled_args, **tiled_kwargs))
        self.states = list(states.view(times, batch, -1))
        return hidden_BLD


def _tiled(value: Any, batch: int, times: int) -> Any:
    """Repeats what has a row per text; what has one row for all texts broadcasts as it is."""
    if isinstance(value, Tensor) and value.ndim > 1 and batch > 1 and len(value) == batch:
        return value.repeat(times, *([1] * (value.ndim - 1)))
    if isinstance(value, tuple):
        return tuple(_tiled(item, batch, times) for item in value)
    return value


class AdapterBank:
    """Scores dialogues by all its adapters at once; the scores are those of each `PreferenceModel` alone."""

    def __init__(
        self,
        classifier: Any,
        tokenizer: Any,
        cards: Mapping[str, Card],
        heads: Sequence[Tensor],
        chosen: Chosen,
        tail: TiledTail | None,
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
        parts = [_read_adapter(Path(folder)) for folder in cards]
        chosen = Chosen(len(parts))
        places = _stack(classifier, [layers for layers, _ in parts], list(cards), chosen)
        tail = _tile_above(classifier, places, chosen)
        classifier.eval()
        return cls(classifier, tokenizer, cards, [head for _, head in parts], chosen, tail)

    def forward(self, ids: Sequence[Sequence[int]], folders: Sequence[str]) -> list[Tensor]:
        """Scores [B, H] per folder, in the order of `folders`."""
        names = list(self.cards)
        self._chosen.rows = [names.index(folder) for folder in folders]
        device = next(self.model.parameters()).device
        tokens_BL, mask_BL = padded(ids, self.tokenizer.pad_token_id, device)
        last_B = last_true_index(mask_BL.bool())
        times = len(folders)
        if self._tail is not None:
            self._tail.last_B = last_B
            self.model.base_model(input_ids=tokens_BL, attention_mask=mask_BL, use_cache=False)
            states = self._tail.take()
        else:
            state = end_states(
                self.model.base_model,
                tokens_BL.repeat(times, 1),
                mask_BL.repeat(times, 1),
                last_B.repeat(times),
                shortcut=True,
            )
            states = list(state.view(times, len(ids), -1))
        return [
            nn.functional.linear(state.to(self._heads[row].dtype), self._heads[row]).float()
            for row, state in zip(self._chosen.rows, states, strict=True)
        ]

    @torch.no_grad()
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

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_scored_texts(self.tokenizer, texts, self.max_length)


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


def _read_adapter(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """`read_adapter` of a decoder, with its score head [H, D]."""
    layers, head = read_adapter(folder)
    return layers, head[f"{HEAD}.weight"]


def _side(stored: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    ending = f".{side}.weight"
    return {
        name.removeprefix(PREFIX).removesuffix(ending): value
        for name, value in stored.items()
        if name.endswith(ending)
    }


def _stack(
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


def _tile_above(classifier: Any, places: Sequence[str], chosen: Chosen) -> TiledTail | None:
    """A tail from the first adapted block on; None where that is the first block, or the attention is mixed."""
    first = min(
        int(found.group(1)) for place in places if (found := re.search(r"\.(\d+)\.", place))
    )
    kinds = set(getattr(classifier.config, "layer_types", None) or ())
    if first == 0 or len(kinds) > 1:
        return None
    base = classifier.base_model
    layout = layout_of(base)
    blocks = getattr(base, layout.blocks)
    tail = TiledTail(list(blocks[first:]), getattr(base, layout.norm), chosen)
    setattr(base, layout.blocks, nn.ModuleList([*blocks[:first], tail]))
    setattr(base, layout.norm, nn.Identity())
    return tail
