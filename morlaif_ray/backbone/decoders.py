"""Where a transformers decoder keeps its blocks, and something else in the place of its last one for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

LAYOUTS = (("h", "ln_f"), ("layers", "norm"), ("layers", "final_layernorm"))
"""(list of blocks, norm after them) of GPT-2, of Llama, Gemma, Mistral, Qwen, and of Phi."""


@dataclass(frozen=True)
class Layout:
    """Names of a trunk's list of blocks and of the norm after them."""

    blocks: str
    norm: str


def find_layout(trunk: Any) -> Layout | None:
    """None for a trunk that keeps them elsewhere."""
    for blocks, norm in LAYOUTS:
        if hasattr(trunk, blocks) and hasattr(trunk, norm):
            return Layout(blocks, norm)
    return None


def last_block(trunk: Any) -> Any:
    """None where the layout is not known."""
    layout = find_layout(trunk)
    return None if layout is None else getattr(trunk, layout.blocks)[-1]


def last_norm(trunk: Any) -> Any:
    """The norm after the blocks of a trunk whose layout is known."""
    layout = find_layout(trunk)
    assert layout is not None
    return getattr(trunk, layout.norm)


@contextmanager
def in_place_of_last_block(trunk: Any, stand_in: nn.Module) -> Iterator[None]:
    """For a trunk whose layout is known. Outside, the trunk is as it was: saving sees no trace."""
    layout = find_layout(trunk)
    assert layout is not None
    blocks = getattr(trunk, layout.blocks)
    whole = blocks[-1]
    blocks[-1] = stand_in
    try:
        yield
    finally:
        blocks[-1] = whole


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
