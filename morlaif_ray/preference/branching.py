"""Late branching: the lower blocks of a transformer once, the last L blocks once per principle.

A `Tail` takes the place of the last blocks inside a Hugging Face decoder, so that the model's own forward still builds
masks and positions, whatever the architecture. Each branch keeps the tensor names of a whole model: saved, every
principle is an ordinary sequence-classification folder whose lower weights are one shared file.
Legend: B texts, K branches, L tokens, D width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from morlaif_ray.backbone import (
    Layout,
    find_layout,
    in_place_of_last_block,
    last_block,
    last_norm,
)
from morlaif_ray.backbone.packing import PackedEnds, packed
from morlaif_ray.errors import ArtifactError, ConfigError
from morlaif_ray.preference.last_token import Ends, PaddedEnds, at_last_token, supports

TRUNK_FILE = "trunk.safetensors"
HEADS_DIR = "heads"
BRANCH_FILE = "branch.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD = "score"
"""Name of the head's weights in a Hugging Face sequence-classification model."""


def layout_of(base: Any) -> Layout:
    """ConfigError for a decoder whose blocks or last norm are not where this module knows them."""
    layout = find_layout(base)
    if layout is not None:
        return layout
    raise ConfigError(
        f"preference.topology: late_branching knows GPT-2, Llama, Gemma and their like, not "
        f"{type(base).__name__}; use shared_trunk"
    )


def num_branch_blocks(num_blocks: int, wanted: int | None) -> int:
    """Blocks of a branch: as configured, or a quarter, at least one; ConfigError when the backbone has fewer."""
    if wanted is None:
        return max(1, num_blocks // 4)
    if wanted > num_blocks:
        raise ConfigError(
            f"preference.branch_blocks {wanted}: the backbone has {num_blocks} blocks; write {num_blocks} or less"
        )
    return wanted


def refuse_mixed_attention(config: Any) -> None:
    """A tail gets the mask of its first block: with sliding and full attention mixed that would be the wrong one."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ConfigError(
            f"preference.topology: late_branching cannot split a backbone with mixed attention "
            f"({', '.join(sorted(kinds))}); use shared_trunk or adapters"
        )


class Tail(nn.Module):
    """Stands at the branch point. Its output passes the trunk's states on; `states` holds what was asked for."""

    last_B: Tensor
    """Index of each text's last real token; set before the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Tensor] = []
        """Normed states [B, D] at the last token, one per evaluated branch."""

    def run(
        self,
        blocks: Sequence[nn.Module],
        rows_BLD: Tensor,
        ends: Ends,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """States [B, D] at the last token after all blocks, the last of them for that token alone where possible."""
        for block in blocks[:-1]:
            rows_BLD = block(rows_BLD, *args, **kwargs)
        if supports(blocks[-1]):
            return at_last_token(blocks[-1], rows_BLD, ends, **kwargs)
        return ends.take(blocks[-1](rows_BLD, *args, **kwargs)).flatten(0, 1)

    def take(self) -> list[Tensor]:
        """The states of the last forward, once."""
        states, self.states = self.states, []
        return states


class BranchedTail(Tail):
    """K copies of the last blocks and of the last norm."""

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module, num_branches: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.ModuleList(copy.deepcopy(block) for block in blocks) for _ in range(num_branches)
        )
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(num_branches))
        self.wanted: Sequence[int] = range(num_branches)

    def forward(self, hidden_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.states = []
        ends = PaddedEnds(self.last_B)
        for index in self.wanted:
            blocks: Any = self.branches[index]
            state_BD = self.run(list(blocks), hidden_BLD, ends, *args, **kwargs)
            self.states.append(self.norms[index](state_BD))
        return hidden_BLD


class LastTail(Tail):
    """Stands in for the last block of a model without branches while `last_block_at_end` is open."""

    def __init__(self, block: nn.Module, ends: Ends) -> None:
        super().__init__()
        self.block = block
        self.ends = ends

    def forward(self, hidden_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.states = [self.run([self.block], hidden_BLD, self.ends, *args, **kwargs)]
        return hidden_BLD


@contextmanager
def last_block_at_end(base: Any, ends: Ends) -> Iterator[LastTail | None]:
    """Inside, the decoder's forward computes its last block at the last tokens alone and leaves the rest unnormed.

    None where the block's arithmetic is not known. Outside, the decoder is as it was: saving sees no trace.
    """
    block = last_block(base)
    if block is None or not supports(block):
        yield None
        return
    tail = LastTail(block, ends)
    with in_place_of_last_block(base, tail):
        yield tail


def end_states(
    base: Any, tokens_BL: Tensor, mask_BL: Tensor, last_B: Tensor, *, shortcut: bool
) -> Tensor:
    """Normed states [B, D] at the last real token; with `shortcut` the last block is computed there alone."""
    inputs: dict[str, Any] = {"use_cache": False}
    embed = base.get_input_embeddings()
    # Gemma 3's, where it makes embeddings.
    both_ways = getattr(base.config, "use_bidirectional_attention", False)
    if find_layout(base) and not both_ways and not isinstance(embed.weight, DTensor):
        # Causal, padded on the right: no real token sees the padding, and the fast attention kernels take no mask.
        # Embeddings, not ids: transformers looks for padding in these. (A sharded table only opens inside the forward.)
        inputs["inputs_embeds"] = embed(tokens_BL)
    else:
        inputs |= {"input_ids": tokens_BL, "attention_mask": mask_BL}
    return _states_at(base, inputs, PaddedEnds(last_B), shortcut)


def packed_end_states(base: Any, ids: Sequence[Sequence[int]], *, shortcut: bool) -> Tensor:
    """The same of texts one behind another, without padding, for a decoder that packs (`can_pack`). No dropout."""
    embed = base.get_input_embeddings()
    tokens_1T, positions_1T, packing = packed(ids, embed.weight.device)
    inputs = {
        "inputs_embeds": embed(tokens_1T),
        "position_ids": positions_1T,
        "packing": packing,
        "use_cache": False,
    }
    return _states_at(base, inputs, PackedEnds(packing), shortcut)


def _states_at(base: Any, inputs: dict[str, Any], ends: Ends, shortcut: bool) -> Tensor:
    if shortcut:
        with last_block_at_end(base, ends) as tail:
            if tail is not None:
                base(**inputs)
                state_BD: Tensor = last_norm(base)(tail.take()[0])
                return state_BD
    return ends.take(base(**inputs).last_hidden_state).flatten(0, 1)


def branch(classifier: Any, num_branches: int, num_blocks: int | None) -> BranchedTail:
    """Replaces the last `num_blocks` blocks of a classifier by K copies of them, in place."""
    base = classifier.base_model
    refuse_mixed_attention(classifier.config)
    layout = layout_of(base)
    blocks = getattr(base, layout.blocks)
    start = len(blocks) - num_branch_blocks(len(blocks), num_blocks)
    tail = BranchedTail(blocks[start:], getattr(base, layout.norm), num_branches)
    setattr(base, layout.blocks, nn.ModuleList([*blocks[:start], tail]))
    setattr(base, layout.norm, nn.Identity())
    return tail


def tail_of(classifier: Any) -> BranchedTail | None:
    """The tail of a branched classifier, None of any other."""
    block = last_block(classifier.base_model)
    return block if isinstance(block, BranchedTail) else None


# ---------------------------------------------------------------- on disk


def save_branched(classifier: Any, heads: Sequence[str], folder: Path) -> None:
    """Writes the shared `trunk.safetensors` and, per principle, a folder that plain transformers loads."""
    trunk, branches = _split_state(classifier)
    save_file(trunk, folder / TRUNK_FILE, metadata={"format": "pt"})
    for name, tensors in zip(heads, branches, strict=True):
        target = folder / HEADS_DIR / name
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / BRANCH_FILE, metadata={"format": "pt"})
        where = dict.fromkeys(trunk, f"../../{TRUNK_FILE}") | dict.fromkeys(tensors, BRANCH_FILE)
        size = sum(t.numel() * t.element_size() for t in (*trunk.values(), *tensors.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        settings = copy.deepcopy(classifier.config)
        settings.id2label, settings.label2id = {0: name}, {name: 0}
        settings.architectures = [type(classifier).__name__]
        settings.save_pretrained(target)


def load_branches(classifier: Any, heads: Sequence[str], folder: Path, num_blocks: int) -> None:
    """Makes K branches of a classifier loaded from the first head's folder; ArtifactError names what is missing."""
    branch(classifier, len(heads), num_blocks)
    old = classifier.score
    classifier.score = nn.Linear(old.in_features, len(heads), bias=old.bias is not None).to(
        dtype=old.weight.dtype, device=old.weight.device
    )
    classifier.num_labels = len(heads)
    own = classifier.state_dict()
    for row, name in enumerate(heads):
        path = folder / HEADS_DIR / name / BRANCH_FILE
        places = _branch_places(classifier, row)
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{path}: the branch of '{name}' cannot be read ({str(error).splitlines()[0]}); "
                f"train the model again"
            ) from None
        for key in sorted(set(places) ^ set(stored)):
            what = "missing" if key in places else "not of this backbone"
            raise ArtifactError(f"{path}: weight '{key}' is {what}; train the model again")
        with torch.no_grad():
            for key, (place, head_row) in places.items():
                target = own[place] if head_row is None else own[place][head_row : head_row + 1]
                if target.shape != stored[key].shape:
                    raise ArtifactError(
                        f"{path}: weight '{key}' has shape {tuple(stored[key].shape)}, the backbone needs "
                        f"{tuple(target.shape)}; train the model again"
                    )
                target.copy_(stored[key])


def _split_state(classifier: Any) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Tensors of the trunk and of each branch, under the names of a whole model."""
    tail = tail_of(classifier)
    assert tail is not None
    state = {name: value.detach().cpu() for name, value in classifier.state_dict().items()}
    branches = []
    taken = set()
    for row in range(len(tail.branches)):
        tensors = {}
        for key, (place, head_row) in _branch_places(classifier, row).items():
            value = state[place] if head_row is None else state[place][head_row : head_row + 1]
            tensors[key] = value.clone().contiguous()
            taken.add(place)
        branches.append(tensors)
    return {name: t.contiguous() for name, t in state.items() if name not in taken}, branches


def _branch_places(classifier: Any, row: int) -> dict[str, tuple[str, int | None]]:
    """Name in a whole model -> (name in the branched model, row of the score head or None)."""
    tail, layout = tail_of(classifier), layout_of(classifier.base_model)
    assert tail is not None
    prefix = classifier.base_model_prefix
    start = len(getattr(classifier.base_model, layout.blocks)) - 1
    inside = f"{prefix}.{layout.blocks}.{start}"
    places: dict[str, tuple[str, int | None]] = {}
    branch_blocks: Any = tail.branches[row]
    for offset, block in enumerate(branch_blocks):
        for key in block.state_dict():
            whole = f"{prefix}.{layout.blocks}.{start + offset}.{key}"
            places[whole] = (f"{inside}.branches.{row}.{offset}.{key}", None)
    for key in tail.norms[row].state_dict():
        places[f"{prefix}.{layout.norm}.{key}"] = (f"{inside}.norms.{row}.{key}", None)
    for key in classifier.score.state_dict():
        places[f"{HEAD}.{key}"] = (f"{HEAD}.{key}", row)
    return places
