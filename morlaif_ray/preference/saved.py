"""What stands beside the weights of a preference model, and what is refused when it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from morlaif_ray.errors import ArtifactError, NumericalError
from morlaif_ray.preference import encoders
from morlaif_ray.preference.branching import HEAD
from morlaif_ray.types import FloatArray

CARD = "preference_model.json"
TEMPLATE = "dialogue-eos-v1"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SAMPLED_VALUES = 256
"""Values of each tensor that enter a backbone's fingerprint."""


@dataclass(frozen=True)
class Card:
    """`preference_model.json`: what scoring needs to be the same everywhere."""

    heads: Sequence[str]
    """Names of the heads, in order."""
    max_length: int
    """Most tokens of a text, EOS included."""
    template: str
    dtype: str
    """torch dtype of the trunk."""
    adapter: bool
    """Whether the folder holds an adapter on `backbone`."""
    backbone: str | None
    backbone_fingerprint: str | None = None
    """`backbone_fingerprint` of the backbone under an adapter; None: full weights, or a folder of an older version."""
    branch_blocks: int | None = None
    """Blocks of each branch of a late-branching model; None: not branched."""
    encoder_head: Sequence[str] | None = None
    """Names of the score head's tensors of an encoder; None: a decoder, whose head is `score.weight`."""

    @property
    def output(self) -> str:
        """Name of the weight with a row per head."""
        names = [
            name for name in self.encoder_head or () if name.rpartition(".")[0] in encoders.OUTPUTS
        ]
        return next((name for name in names if name.endswith(".weight")), f"{HEAD}.weight")


def write_card(folder: Path, card: Card) -> None:
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")


def read_card(folder: Path) -> Card:
    """ArtifactError where the card is missing, damaged or of another template."""
    path = folder / CARD
    try:
        card = Card(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: not a preference model ({CARD} is missing)") from None
    except (ValueError, TypeError):
        raise ArtifactError(f"{path}: damaged; train the model again") from None
    expected = TEMPLATE if card.encoder_head is None else encoders.TEMPLATE
    if card.template != expected:
        raise ArtifactError(
            f"{folder}: made with template {card.template!r}, this version uses {expected!r}"
        )
    return card


def backbone_fingerprint(classifier: Any) -> str:
    """SHA-256 over names, shapes and evenly spaced values of the frozen weights; heads and adapters left out.

    A sample of the values, not all of them: cheap at any size, and training leaves no tensor's sample as it was.
    """
    digest = hashlib.sha256()
    heads: tuple[str, ...] = (HEAD,)
    if encoders.is_encoder(classifier):
        heads = tuple(f"{name}." for name in encoders.head_modules(classifier))
    for name, value in sorted(classifier.named_parameters()):
        if name.startswith(heads) or "lora_" in name:
            continue
        flat = value.detach().reshape(-1)
        stride = max(1, flat.numel() // SAMPLED_VALUES)
        sample = flat[::stride][:SAMPLED_VALUES].to("cpu", torch.float32)
        digest.update(f"{name.replace('.base_layer', '')} {tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def check_backbone(folder: Path, card: Card, classifier: Any) -> None:
    """ArtifactError when an adapter was trained on other weights than those found under the backbone's name."""
    if card.backbone_fingerprint is None:
        return
    if backbone_fingerprint(classifier) != card.backbone_fingerprint:
        raise ArtifactError(
            f"{folder}: this adapter was trained on another backbone than what {card.backbone} holds now; "
            f"put the old backbone back or train the model again"
        )


def check_adapter_files(folder: Path, card: Card) -> None:
    """ArtifactError where the adapter's weights or head are absent, damaged, or of another number of heads."""
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ArtifactError(f"{folder}: {ADAPTER_WEIGHTS} is missing; train the model again")
    try:
        with safe_open(weights, framework="pt") as stored:
            names = set(stored.keys())
            heads = {
                name: stored.get_slice(name).get_shape()[0]
                for name in names
                if name.endswith(f".{card.output}")
            }
    except SafetensorError as error:
        raise ArtifactError(f"{weights}: damaged ({error}); train the model again") from None
    absent = [
        name for name in card.encoder_head or () if not any(n.endswith(f".{name}") for n in names)
    ]
    if not heads or absent:
        raise ArtifactError(
            f"{folder}: the score head is missing beside the adapter; train the model again"
        )
    check_num_heads(folder, card, next(iter(heads.values())))


def check_num_heads(folder: Path, card: Card, num_stored: int) -> None:
    if num_stored != len(card.heads):
        raise ArtifactError(
            f"{folder}: {CARD} names {len(card.heads)} heads ({', '.join(card.heads)}), the weights hold "
            f"{num_stored}; take both from one training"
        )


def check_stored_heads(folder: Path, card: Card) -> None:
    """`check_num_heads` of full weights. A damaged or sharded file is left to the loader, which names it."""
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as stored:
            if card.output in stored.keys():  # noqa: SIM118 (not a dict)
                check_num_heads(folder, card, stored.get_slice(card.output).get_shape()[0])
    except (OSError, SafetensorError):
        return


def require_finite(scores_BH: FloatArray, heads: Sequence[str]) -> FloatArray:
    """The scores [B, H] as they are; NumericalError names head and text of one that is not finite."""
    if not np.isfinite(scores_BH).all():
        row, head = np.argwhere(~np.isfinite(scores_BH))[0]
        raise NumericalError(
            f"preference model '{heads[head]}' gave a non-finite score for text {row}"
        )
    return scores_BH
