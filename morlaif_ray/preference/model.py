"""A preference model: a transformer trunk with one score head per principle that it serves.

Saved as a Hugging Face sequence-classification folder (`num_labels` = heads, `id2label` = their names), so plain
transformers or PEFT load it too; `preference_model.json` adds what scoring needs to be the same everywhere. With
branches (`branching.py`) there is such a folder per head, above one shared file. `encoders.py`: what BERT and its like
do otherwise.
Legend: B texts, H heads, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from morlaif_ray.backbone import (
    can_pack,
    encode_framed_texts,
    encode_scored_texts,
    load_tokenizer,
    load_whole,
    require_eos,
    require_frame,
    use_packing,
)
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.cpu_products import fast_products
from morlaif_ray.errors import ArtifactError
from morlaif_ray.length_groups import cheapest_groups, pass_overhead_tokens
from morlaif_ray.preference import encoders
from morlaif_ray.preference.batching import length_batches, padded
from morlaif_ray.preference.branching import (
    HEAD,
    HEADS_DIR,
    branch,
    end_states,
    layout_of,
    load_branches,
    num_branch_blocks,
    packed_end_states,
    save_branched,
    tail_of,
)
from morlaif_ray.preference.saved import (
    TEMPLATE,
    Card,
    backbone_fingerprint,
    check_adapter_files,
    check_backbone,
    check_stored_heads,
    read_card,
    require_finite,
    write_card,
)
from morlaif_ray.tensor_ops import last_true_index
from morlaif_ray.types import FloatArray

DEFAULT_BATCH = 64
PACKED_TOKENS = 1024
"""Tokens of a pass of texts without padding: enough that reading the weights costs little beside them, and few enough
for a CPU's caches (measured with 19M weights: 5% less CPU time than padded passes; 512 and 2,048 gain less)."""


class PreferenceModel:
    """Scores dialogues. Higher is better on the head's principle; only differences and ranks carry meaning."""

    def __init__(self, model: Any, tokenizer: Any, heads: Sequence[str], max_length: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.heads = tuple(heads)
        self.max_length = max_length
        self.is_encoder = encoders.is_encoder(_classifier(model))
        self.tokens_per_batch: int | None = None
        """Most tokens, padding included, of one pass of `forward`; None: one pass, padded to the longest."""
        self.last_block_at_end = False
        """Whether the last block is computed for the last token alone: the same scores within rounding, faster."""

    @classmethod
    def from_backbone(
        cls,
        path: str,
        heads: Sequence[str],
        *,
        max_length: int,
        seed: int,
        lora: LoraConfig | None = None,
        dtype: str = "float32",
        topology: str = "separate",
        branch_blocks: int | None = None,
    ) -> PreferenceModel:
        """A new preference model on the trunk of a causal LM or an encoder.

        Score heads on a causal LM start at seeded normal values of 1 / sqrt(width + 1) (Stiennon et al. 2020): scores
        begin at the size of 1, and the trunk learns from the first step on. An encoder's start as transformers has it.

        `late_branching` gives every head its own last `branch_blocks` blocks (None: a quarter): copies, or with `lora`
        adapters there alone. Copies for a single head would be a plain model, and are one.
        """
        from transformers import AutoModelForSequenceClassification

        tokenizer = load_tokenizer(path, encoders=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % (1 << 62))
            model = load_whole(
                AutoModelForSequenceClassification,
                path,
                "backbone",
                fresh=(HEAD, *encoders.FRESH),
                on_fresh=_start_head,
                problem_type="regression",
                dtype=getattr(torch, dtype),
                **_labels(heads),
            )
            (require_frame if encoders.is_encoder(model) else require_eos)(path, tokenizer)
            model.config.pad_token_id = tokenizer.pad_token_id
            limit = encoders.num_positions(model) or max_length
            late = topology == "late_branching" and (len(heads) > 1 or lora is not None)
            if lora is not None:
                model = _with_adapters(model, lora, late=late, branch_blocks=branch_blocks)
            elif late:
                branch(model, len(heads), branch_blocks)
        return cls(model, tokenizer, heads, min(max_length, limit))

    @classmethod
    def load(cls, folder: str | Path) -> PreferenceModel:
        """Loads a saved folder; ArtifactError where a part is missing, or an adapter's backbone is another one."""
        folder = Path(folder)
        card = read_card(folder)
        tokenizer = load_tokenizer(str(folder), encoders=card.encoder_head is not None)
        model = _load_classifier(folder, card)
        model.eval()
        return cls(model, tokenizer, card.heads, card.max_length)

    def save(self, folder: str | Path) -> None:
        """Writes weights (safetensors, score head included), tokenizer and card."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        inner = _classifier(self.model)
        adapted, tail = _is_adapted(self.model), tail_of(inner)
        if tail is None:
            self.model.save_pretrained(folder, safe_serialization=True)
        else:
            save_branched(self.model, self.heads, folder)
        self.tokenizer.save_pretrained(folder)
        settings = self.model.peft_config["default"] if adapted else None
        card = Card(
            heads=list(self.heads),
            max_length=self.max_length,
            template=encoders.TEMPLATE if self.is_encoder else TEMPLATE,
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            adapter=adapted,
            backbone=settings.base_model_name_or_path if settings is not None else None,
            backbone_fingerprint=backbone_fingerprint(inner) if adapted else None,
            branch_blocks=None if tail is None else len(tail.branches[0]),  # type: ignore[arg-type]
            encoder_head=encoders.head_tensors(inner) if self.is_encoder else None,
        )
        write_card(folder, card)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encode = encode_framed_texts if self.is_encoder else encode_scored_texts
        return encode(self.tokenizer, texts, self.max_length)

    def forward(self, ids: Sequence[Sequence[int]], heads: Sequence[int] | None = None) -> Tensor:
        """Scores [B, H] of token id lists, of a decoder at the last real token of each (padding never matters).

        `heads` (default all) chooses the columns; a branch that is not wanted is not computed. With
        `tokens_per_batch` set, texts of similar length share a pass and the rows come back in order.
        """
        if self.tokens_per_batch is None:
            return self._pass(ids, heads)
        batches = length_batches([len(row) for row in ids], len(ids), self.tokens_per_batch)
        scores = torch.cat([self._pass([ids[i] for i in rows], heads) for rows in batches])
        places = torch.empty(len(ids), dtype=torch.long)
        places[torch.tensor([row for rows in batches for row in rows])] = torch.arange(len(ids))
        return scores[places.to(scores.device)]

    def _pass(self, ids: Sequence[Sequence[int]], heads: Sequence[int] | None) -> Tensor:
        device = next(self.model.parameters()).device
        tokens_BL, mask_BL = padded(ids, self.tokenizer.pad_token_id, device)
        inner = _classifier(self.model)
        if self.is_encoder:
            logits_BH: Tensor = inner(input_ids=tokens_BL, attention_mask=mask_BL).logits.float()
            return logits_BH if heads is None else logits_BH[:, list(heads)]
        last_B = last_true_index(mask_BL.bool())
        tail = tail_of(inner)
        if tail is not None:
            tail.last_B = last_B
            tail.wanted = range(len(self.heads)) if heads is None else heads
        state_BD = end_states(
            inner.base_model, tokens_BL, mask_BL, last_B, shortcut=self.last_block_at_end
        )
        if tail is None:
            scores: Tensor = inner.score(state_BD).float()
            return scores if heads is None else scores[:, list(heads)]
        weight_HD = inner.score.weight[list(tail.wanted)]
        return torch.einsum("bhd,hd->bh", torch.stack(tail.take(), dim=1), weight_HD).float()

    @torch.no_grad()
    @fast_products()
    def raw_scores(
        self,
        texts: Sequence[str],
        heads: Sequence[int] | None = None,
        *,
        batch_size: int = DEFAULT_BATCH,
        max_tokens: int | None = None,
    ) -> FloatArray:
        """Scores [B, H] of the wanted heads as they come; one may be non-finite: the caller says what that means.

        Sorted by length inside, so padding stays small; order kept outside.
        """
        self.model.eval()
        ids = self.encode(texts)
        scores = np.empty((len(ids), len(self.heads if heads is None else heads)), dtype=np.float64)
        lengths = [len(row) for row in ids]
        if self._packs():
            limit = min(max_tokens or PACKED_TOKENS, PACKED_TOKENS)
            groups, score = length_batches(lengths, batch_size, limit), self._packed_pass
        else:
            overhead = pass_overhead_tokens(self.model)
            groups, score = cheapest_groups(lengths, batch_size, max_tokens, overhead), self._pass
        for rows in groups:
            scores[rows] = score([ids[i] for i in rows], heads).cpu().numpy()
        return scores

    def _packs(self) -> bool:
        """Whether texts are scored one behind another, without padding: on a CPU, where the attention is known."""
        inner = _classifier(self.model)
        weight = inner.get_input_embeddings().weight
        return (
            not self.is_encoder
            and weight.device.type == "cpu"
            and not isinstance(weight, DTensor)
            and tail_of(inner) is None
            and can_pack(inner.config, self.max_length)
        )

    def _packed_pass(self, ids: Sequence[Sequence[int]], heads: Sequence[int] | None) -> Tensor:
        inner = _classifier(self.model)
        use_packing(inner)
        state_BD = packed_end_states(inner.base_model, ids, shortcut=self.last_block_at_end)
        scores: Tensor = inner.score(state_BD).float()
        return scores if heads is None else scores[:, list(heads)]

    def score_heads(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = DEFAULT_BATCH,
        max_tokens: int | None = None,
    ) -> FloatArray:
        """Raw scores [B, H] in head order; NumericalError names head and text of one that is not finite."""
        scores = self.raw_scores(texts, batch_size=batch_size, max_tokens=max_tokens)
        return require_finite(scores, self.heads)

    def score(self, texts: Sequence[str], *, batch_size: int = DEFAULT_BATCH) -> FloatArray:
        """Raw scores [B] of a model with one head."""
        if len(self.heads) != 1:
            raise ValueError(f"this model has {len(self.heads)} heads; use score_heads")
        return self.score_heads(texts, batch_size=batch_size)[:, 0]


def _classifier(model: Any) -> Any:
    """The sequence-classification module itself, below adapters where there are any."""
    return model.get_base_model() if _is_adapted(model) else model


def _start_head(model: Any, fresh: Sequence[str]) -> None:
    """Gives a new score head its first weights."""
    if f"{HEAD}.weight" in fresh:
        weight_HD = model.get_submodule(HEAD).weight
        torch.nn.init.normal_(weight_HD, std=(weight_HD.shape[1] + 1) ** -0.5)


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")


def _with_adapters(model: Any, lora: LoraConfig, *, late: bool, branch_blocks: int | None) -> Any:
    from peft import LoraConfig as PeftLora
    from peft import TaskType, get_peft_model

    targets: Any = lora.target_modules
    if late:
        targets = _linear_layers_of_last_blocks(model, lora, branch_blocks)
    settings = PeftLora(
        task_type=TaskType.SEQ_CLS,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=encoders.head_modules(model) if encoders.is_encoder(model) else [HEAD],
    )
    return get_peft_model(model, settings)


def _linear_layers_of_last_blocks(
    model: Any, lora: LoraConfig, branch_blocks: int | None
) -> list[str]:
    """Full names of the adapted layers: PEFT's own `layers_to_transform` does not go with all-linear."""
    layout = layout_of(model.base_model)
    blocks = getattr(model.base_model, layout.blocks)
    start = len(blocks) - num_branch_blocks(len(blocks), branch_blocks)
    names = []
    for index in range(start, len(blocks)):
        for name, module in blocks[index].named_modules():
            if type(module).__name__ in ("Linear", "Conv1D") and (
                lora.target_modules == "all-linear"
                or name.rpartition(".")[2] in lora.target_modules
            ):
                names.append(f"{model.base_model_prefix}.{layout.blocks}.{index}.{name}")
    return names


def _load_classifier(folder: Path, card: Card) -> Any:
    from transformers import AutoModelForSequenceClassification

    dtype = getattr(torch, card.dtype)
    if card.branch_blocks is not None:
        return _load_branched(folder, card)
    options = {"dtype": dtype, **_labels(card.heads)}
    if not card.adapter:
        check_stored_heads(folder, card)
        return load_whole(
            AutoModelForSequenceClassification, str(folder), "preference model", **options
        )
    from peft import PeftModel

    check_adapter_files(folder, card)
    model = load_whole(
        AutoModelForSequenceClassification,
        str(card.backbone),
        "backbone",
        fresh=HEAD if card.encoder_head is None else encoders.FRESH,
        **options,
    )
    check_backbone(folder, card, model)
    return PeftModel.from_pretrained(model, folder)


def _load_branched(folder: Path, card: Card) -> Any:
    from transformers import AutoModelForSequenceClassification

    missing = [name for name in card.heads if not (folder / HEADS_DIR / name).is_dir()]
    if missing:
        raise ArtifactError(
            f"{folder / HEADS_DIR}: the branch of '{missing[0]}' is missing; train the model again"
        )
    model = load_whole(
        AutoModelForSequenceClassification,
        str(folder / HEADS_DIR / card.heads[0]),
        "preference model",
        dtype=getattr(torch, card.dtype),
        num_labels=1,
    )
    assert card.branch_blocks is not None
    load_branches(model, card.heads, folder, card.branch_blocks)
    return model


def _labels(heads: Sequence[str]) -> dict[str, Any]:
    """What names the heads in a Hugging Face config."""
    return {
        "num_labels": len(heads),
        "id2label": dict(enumerate(heads)),
        "label2id": {name: i for i, name in enumerate(heads)},
    }
