"""The last block at the last token alone, which is all that a score reads.

Keys and values need every token; query, attention output and feed-forward do not. With n blocks that saves most of 1/n
of a forward and of its gradient. Equal to the whole block within rounding.
Legend: B texts, L tokens, D width, N attention heads, E their width. Shapes are those of padded rows; packed ones
(`packing.py`) are a single row of all tokens, with the last tokens of all texts beside one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

GPT2 = "GPT2Block"
LLAMA = ("LlamaDecoderLayer", "GemmaDecoderLayer")


class Ends(Protocol):
    """The last tokens of the texts, in a layout of texts in rows."""

    def take(self, states: Tensor) -> Tensor:
        """The rows of [B, L, width] at the last tokens, [B, 1, width]."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        """Attention [B, 1, N*E] of the last token (query [B, N, 1, E]) over itself and what stands before it."""


@dataclass(frozen=True)
class PaddedEnds:
    """A row per text, its last real token at index `last_B`."""

    last_B: Tensor

    def take(self, states: Tensor) -> Tensor:
        rows = torch.arange(len(states), device=states.device)
        return states[rows, self.last_B].unsqueeze(1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        steps_L = torch.arange(key.shape[2], device=key.device)
        seen = (steps_L[None, :] <= self.last_B[:, None])[:, None, None, :]
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(2)


def supports(block: Any) -> bool:
    """Whether this module knows the block's arithmetic; any other block is computed whole."""
    name = type(block).__name__
    if name == GPT2:
        return not block.attn.reorder_and_upcast_attn and not hasattr(block, "crossattention")
    return name in LLAMA


def at_last_token(block: Any, hidden_BLD: Tensor, ends: Ends, **kwargs: Any) -> Tensor:
    """The block's output [B, D] at the last token of each text; `kwargs` are what the model gives its blocks."""
    if type(block).__name__ == GPT2:
        return _gpt2(block, hidden_BLD, ends)
    return _llama(block, hidden_BLD, ends, kwargs["position_embeddings"])


def _gpt2(block: Any, hidden_BLD: Tensor, ends: Ends) -> Tensor:
    attn = block.attn
    normed_BLD = block.ln_1(hidden_BLD)
    if type(attn.c_attn).__name__ == "Conv1D":  # one matrix [D, 3D] for query, key and value
        weight, bias, width = attn.c_attn.weight, attn.c_attn.bias, attn.split_size
        query = F.linear(ends.take(normed_BLD), weight[:, :width].T, bias[:width])
        key, value = F.linear(normed_BLD, weight[:, width:].T, bias[width:]).split(width, dim=2)
    else:  # with adapters
        query, key, value = attn.c_attn(normed_BLD).split(attn.split_size, dim=2)
        query = ends.take(query)
    mixed = ends.attend(
        _heads(query, attn.head_dim),
        _heads(key, attn.head_dim),
        _heads(value, attn.head_dim),
        attn.scaling,
        attn.attn_dropout.p if attn.training else 0.0,
    )
    residual = ends.take(hidden_BLD) + attn.resid_dropout(attn.c_proj(mixed))
    state: Tensor = residual + block.mlp(block.ln_2(residual))
    return state.flatten(0, 1)


def _llama(block: Any, hidden_BLD: Tensor, ends: Ends, positions: tuple[Tensor, Tensor]) -> Tensor:
    attn = block.self_attn
    normed_BLD = block.input_layernorm(hidden_BLD)
    cos_BLE, sin_BLE = (table.expand(len(hidden_BLD), -1, -1) for table in positions)
    key = _heads(attn.k_proj(normed_BLD), attn.head_dim)
    query = _heads(attn.q_proj(ends.take(normed_BLD)), attn.head_dim)
    mixed = ends.attend(
        _rotate(query, ends.take(cos_BLE), ends.take(sin_BLE)),
        _rotate(key, cos_BLE, sin_BLE),
        _heads(attn.v_proj(normed_BLD), attn.head_dim),
        attn.scaling,
        attn.attention_dropout if attn.training else 0.0,
    )
    residual = ends.take(hidden_BLD) + attn.o_proj(mixed)
    state: Tensor = residual + block.mlp(block.post_attention_layernorm(residual))
    return state.flatten(0, 1)


def _heads(flat_BLD: Tensor, head_dim: int) -> Tensor:
    """[B, L, N*E] -> [B, N, L, E]."""
    return flat_BLD.view(*flat_BLD.shape[:-1], -1, head_dim).transpose(1, 2)


def _rotate(states_BNLE: Tensor, cos_BLE: Tensor, sin_BLE: Tensor) -> Tensor:
    """Rotary positions as Llama and Gemma apply them."""
    half = states_BNLE.shape[-1] // 2
    turned = torch.cat((-states_BNLE[..., half:], states_BNLE[..., :half]), dim=-1)
    return states_BNLE * cos_BLE.unsqueeze(1) + turned * sin_BLE.unsqueeze(1)
