"""A preference model: a transformer trunk with one score head per principle that it serves.

Saved as a Hugging Face sequence-classification folder (`num_labels` = heads, `id2label` = their names), so plain
transformers or PEFT load it too; `preference_model.json` adds what scoring needs to be the same everywhere.
Legend: B texts, H heads, L tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morlaif_ray.backbone import encode_scored_text, load_tokenizer, load_whole
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.errors import ArtifactError, NumericalError
from morlaif_ray.tensor_ops import last_true_index
from morlaif_ray.types import FloatArray

CARD = "preference_model.json"
TEMPLATE = "dialogue-eos-v1"
HEAD = "score"
"""Name of the head's weights in a Hugging Face sequence-classification model."""


class PreferenceModel:
    """Scores dialogues. Higher is better on the head's principle; only differences and ranks carry meaning."""

    def __init__(self, model: Any, tokenizer: Any, heads: Sequence[str], max_length: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.heads = tuple(heads)
        self.max_length = max_length

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
    ) -> PreferenceModel:
        """A new preference model on a causal LM's trunk; the score heads start at small seeded values."""
        from transformers import AutoModelForSequenceClassification

        tokenizer = load_tokenizer(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % (1 << 62))
            model = load_whole(
                AutoModelForSequenceClassification,
                path,
                "backbone",
                fresh=HEAD,
                problem_type="regression",
                dtype=getattr(torch, dtype),
                **_labels(heads),
            )
            model.config.pad_token_id = tokenizer.pad_token_id
            limit = getattr(model.config, "max_position_embeddings", None) or max_length
            if lora is not None:
                model = _with_adapters(model, lora)
        return cls(model, tokenizer, heads, min(max_length, limit))

    @classmethod
    def load(cls, folder: str | Path) -> PreferenceModel:
        """Loads a saved folder; ArtifactError where card, tokenizer or score head is missing."""
        folder = Path(folder)
        card_path = folder / CARD
        try:
            card = json.loads(card_path.read_text(encoding="utf-8"))
            template, _ = card["template"], (card["heads"], card["max_length"], card["dtype"])
        except FileNotFoundError:
            raise ArtifactError(f"{folder}: not a preference model ({CARD} is missing)") from None
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(f"{card_path}: damaged; train the model again") from None
        if template != TEMPLATE:
            raise ArtifactError(
                f"{folder}: made with template {template!r}, this version uses {TEMPLATE!r}"
            )
        tokenizer = load_tokenizer(str(folder))
        model = _load_classifier(folder, card)
        model.eval()
        return cls(model, tokenizer, card["heads"], card["max_length"])

    def save(self, folder: str | Path) -> None:
        """Writes weights (safetensors, score head included), tokenizer and card."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        adapters = _is_adapted(self.model)
        card = {
            "heads": list(self.heads),
            "max_length": self.max_length,
            "template": TEMPLATE,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "adapter": adapters,
            "backbone": self.model.peft_config["default"].base_model_name_or_path
            if adapters
            else None,
        }
        (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encode_scored_text(self.tokenizer, text, self.max_length) for text in texts]

    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Scores [B, H] of token id lists, at the last real token of each (padding never matters)."""
        length = max(len(row) for row in ids)
        device = next(self.model.parameters()).device
        pad = self.tokenizer.pad_token_id
        tokens_BL = torch.tensor(
            [[*row, *([pad] * (length - len(row)))] for row in ids], device=device
        )
        mask_BL = torch.tensor(
            [[1] * len(row) + [0] * (length - len(row)) for row in ids], device=device
        )
        inner = _classifier(self.model)
        hidden_BLD = inner.base_model(
            input_ids=tokens_BL, attention_mask=mask_BL, use_cache=False
        ).last_hidden_state
        last_B = last_true_index(mask_BL.bool())
        hidden_BD = hidden_BLD[torch.arange(len(ids), device=device), last_B]
        return inner.score(hidden_BD).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def score_heads(self, texts: Sequence[str], *, batch_size: int = 64) -> FloatArray:
        """Raw scores [B, H] in head order. Sorted by length inside, so padding stays small; order kept outside."""
        self.model.eval()
        ids = self.encode(texts)
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        scores = np.empty((len(ids), len(self.heads)), dtype=np.float64)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            scores[rows] = self.forward([ids[i] for i in rows]).cpu().numpy()
        if not np.isfinite(scores).all():
            row, head = np.argwhere(~np.isfinite(scores))[0]
            raise NumericalError(
                f"preference model '{self.heads[head]}' gave a non-finite score for text {row}"
            )
        return scores

    def score(self, texts: Sequence[str], *, batch_size: int = 64) -> FloatArray:
        """Raw scores [B] of a model with one head."""
        if len(self.heads) != 1:
            raise ValueError(f"this model has {len(self.heads)} heads; use score_heads")
        return self.score_heads(texts, batch_size=batch_size)[:, 0]


def _classifier(model: Any) -> Any:
    """The sequence-classification module itself, below adapters where there are any."""
    return model.get_base_model() if _is_adapted(model) else model


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")


def _with_adapters(model: Any, lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLora
    from peft import TaskType, get_peft_model

    settings = PeftLora(
        task_type=TaskType.SEQ_CLS,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=["score"],
    )
    return get_peft_model(model, settings)


def _load_classifier(folder: Path, card: dict[str, Any]) -> Any:
    from transformers import AutoModelForSequenceClassification

    options = {"dtype": getattr(torch, card["dtype"]), **_labels(card["heads"])}
    if not card["adapter"]:
        return load_whole(
            AutoModelForSequenceClassification, str(folder), "preference model", **options
        )
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ArtifactError(
            f"{folder}: adapter_model.safetensors is missing; train the model again"
        )
    try:
        with safe_open(weights, framework="pt") as stored:
            names = list(stored.keys())
    except SafetensorError as error:
        raise ArtifactError(f"{weights}: damaged ({error}); train the model again") from None
    if not any(HEAD in name for name in names):
        raise ArtifactError(
            f"{folder}: the score head is missing beside the adapter; train the model again"
        )
    model = load_whole(
        AutoModelForSequenceClassification, card["backbone"], "backbone", fresh=HEAD, **options
    )
    return PeftModel.from_pretrained(model, folder)


def _labels(heads: Sequence[str]) -> dict[str, Any]:
    """What names the heads in a Hugging Face config."""
    return {
        "num_labels": len(heads),
        "id2label": dict(enumerate(heads)),
        "label2id": {name: i for i, name in enumerate(heads)},
    }
