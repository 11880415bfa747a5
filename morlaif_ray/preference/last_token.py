"""The last block at the last token alone, which is all that a score reads.

Keys and values need every token; query, attention output and feed-forward do not. With n blocks that saves most of 1/n
of a forward and of its gradient. Equal to the whole block within rounding.
Legend: B texts, L tokens, D width, N attention heads, E their width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GPT2 = "GPT2Block"
LLAMA = ("LlamaDecoderLayer", "GemmaDecoderLayer")


def supports(block: Any) -> bool:
    """Whether this module knows the block's arithmetic; any other block is computed whole."""
    name = type(block).__name__
    if name == GPT2:
        return not block.attn.reorder_and_upcast_attn and not hasattr(block, "crossattention")
    return name in LLAMA


def at_last_token(block: Any, hidden_BLD: Tensor, last_B: Tensor, **kwargs: Any) -> Tensor:
    """The block's output [B, D] at index `last_B` of each row; `kwargs` are what the model gives its blocks."""
    if type(block).__name__ == GPT2:
        return _gpt2(block, hidden_BLD, last_B)
    return _llama(block, hidden_BLD, last_B, kwargs["position_embeddings"])


def _gpt2(block: Any, hidden_BLD: Tensor, last_B: Tensor) -> Tensor:
    attn = block.attn
    rows = torch.arange(len(hidden_BLD), device=hidden_BLD.device)
    query, key, value = attn.c_attn(block.ln_1(hidden_BLD)).split(attn.split_size, dim=2)
    dropout = attn.attn_dropout.p if attn.training else 0.0
    last_B1D = query[rows, last_B].unsqueeze(1)
    mixed = _attend(
        _heads(last_B1D, attn.head_dim),
        _heads(key, attn.head_dim),
        _heads(value, attn.head_dim),
        last_B,
        attn.scaling,
        dropout,
    )
    residual = hidden_BLD[rows, last_B].unsqueeze(1)
    residual = residual + attn.resid_dropout(attn.c_proj(mixed))
    state_BD: Tensor = (residual + block.mlp(block.ln_2(residual))).squeeze(1)
    return state_BD


def _llama(
    block: Any, hidden_BLD: Tensor, last_B: Tensor, positions: tuple[Tensor, Tensor]
) -> Tensor:
    attn = block.self_attn
    rows = torch.arange(len(hidden_BLD), device=hidden_BLD.device)
    normed_BLD = block.input_layernorm(hidden_BLD)
    cos_BLE, sin_BLE = (table.expand(len(hidden_BLD), -1, -1) for table in positions)
    key = _heads(attn.k_proj(normed_BLD), attn.head_dim)
    query = _heads(attn.q_proj(normed_BLD[rows, last_B].unsqueeze(1)), attn.head_dim)
    mixed = _attend(
        _rotate(query, cos_BLE[rows, last_B].unsqueeze(1), sin_BLE[rows, last_B].unsqueeze(1)),
        _rotate(key, cos_BLE, sin_BLE),
        _heads(attn.v_proj(normed_BLD), attn.head_dim),
        last_B,
        attn.scaling,
        attn.attention_dropout if attn.training else 0.0,
    )
    residual = hidden_BLD[rows, last_B].unsqueeze(1) + attn.o_proj(mixed)
    state_BD: Tensor = (residual + block.mlp(block.post_attention_layernorm(residual))).squeeze(1)
    return state_BD


def _heads(flat_BLD: Tensor, head_dim: int) -> Tensor:
    """[B, L, N*E] -> [B, N, L, E]."""
    return flat_BLD.view(*flat_BLD.shape[:-1], -1, head_dim).transpose(1, 2)


def _rotate(states_BNLE: Tensor, cos_BLE: Tensor, sin_BLE: Tensor) -> Tensor:
    """Rotary positions as Llama and Gemma apply them."""
    half = states_BNLE.shape[-1] // 2
    turned = torch.cat((-states_BNLE[..., half:], states_BNLE[..., :half]), dim=-1)
    return states_BNLE * cos_BLE.unsqueeze(1) + turned * sin_BLE.unsqueeze(1)


def _attend(
    query_BN1E: Tensor, key: Tensor, value: Tensor, last_B: Tensor, scaling: float, dropout: float
) -> Tensor:
    """Attention of the last token over itself and what stands before it, [B, 1, N*E]."""
    steps_L = torch.arange(key.shape[2], device=key.device)
    seen = (steps_L[None, :] <= last_B[:, None])[:, None, None, :]
    mixed = F.scaled_dot_product_attention(
        query_BN1E, key, value, attn_mask=seen, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2).flatten(2)
