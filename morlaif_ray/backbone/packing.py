"""Texts of different lengths one behind another in a single row: no linear layer computes padding.

transformers hands query, key and value of the whole row to `attend_packed`, which attends inside each text alone; masks
are not needed, since a text's tokens see themselves and what stands before them. Positions restart at every text.
Legend: B texts, K copies of them, T tokens of all texts, D width, N attention heads, E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION = "morlaif_packed"
"""The name under which transformers finds `attend_packed`."""
KINDS = ("gpt2", "llama", "gemma", "mistral", "qwen2", "qwen3", "phi")
"""`model_type`s whose attention is causal and plain, and whose blocks pass keyword arguments on to it."""


@dataclass(frozen=True)
class Packing:
    """Where the texts lie in a row that holds all of them `times` times, copy by copy."""

    starts: tuple[int, ...]
    """First token of each text, and the number of tokens T at the end: B + 1 values."""
    times: int = 1
    device: Any = "cpu"

    @property
    def num_tokens(self) -> int:
        """T: tokens of one copy."""
        return self.starts[-1]

    @cached_property
    def last(self) -> Tensor:
        """Place in the row of each text's last token, [K*B], copy by copy."""
        ends_B = torch.tensor(self.starts[1:], device=self.device) - 1
        copies_K = torch.arange(self.times, device=self.device)
        return (copies_K[:, None] * self.num_tokens + ends_B).flatten()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, *, at_end: bool
    ) -> Tensor:
        """Attention inside each text, [1, tokens or K*B, N, E] from [1, N, tokens, E].

        `at_end`: the query holds the last token of each text alone, [1, N, K*B, E]. A CPU computes text by text, an
        accelerator all of them in one padded call.
        """
        attend = self.text_by_text if query.device.type == "cpu" else self.side_by_side
        return attend(query, key, value, scaling, at_end)

    def text_by_text(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, at_end: bool
    ) -> Tensor:
        """`attend` without any padding."""
        sizes = [end - start for start, end in pairwise(self.starts)]
        # Split by the tokens' own dimension, which lies outermost: gradients come back in one piece, not text by text.
        texts = [
            self._by_copy(states).transpose(1, 2).split(parts, dim=1)
            for states, parts in (
                (query, [1] * len(sizes) if at_end else sizes),
                (key, sizes),
                (value, sizes),
            )
        ]
        mixed = [
            F.scaled_dot_product_attention(
                one_query.transpose(1, 2),
                one_key.transpose(1, 2),
                one_value.transpose(1, 2),
                scale=scaling,
                is_causal=not at_end,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)
            for one_query, one_key, one_value in zip(*texts, strict=True)
        ]
        return torch.cat(mixed, dim=1).flatten(0, 1).unsqueeze(0)

    def side_by_side(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, at_end: bool
    ) -> Tensor:
        """`attend` with a row per text, padded for this call alone."""
        spread, gathered, seen = self._cells
        last = query.squeeze(0).transpose(0, 1).unsqueeze(2)  # [K*B, N, 1, E] if at_end
        mixed = F.scaled_dot_product_attention(
            last if at_end else self._spread(query, spread),
            self._spread(key, spread),
            self._spread(value, spread),
            attn_mask=seen[:, None, None, :] if at_end else None,
            is_causal=not at_end,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        flat = mixed.transpose(1, 2).flatten(0, 1)
        return (flat if at_end else flat.index_select(0, gathered)).unsqueeze(0)

    @cached_property
    def _cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token of each cell [K*B*L] (padding repeats a last token), cell of each token [K*T], real cells [K*B, L]."""
        starts = torch.tensor(self.starts, device=self.device)
        starts_B, lengths_B = starts[:-1], starts.diff()
        steps_L = torch.arange(max(b - a for a, b in pairwise(self.starts)), device=self.device)
        tokens_BL = starts_B[:, None] + torch.minimum(steps_L, lengths_B[:, None] - 1)
        copies_K = torch.arange(self.times, device=self.device)[:, None, None] * self.num_tokens
        real = (steps_L < lengths_B[:, None]).repeat(self.times, 1)
        return (copies_K + tokens_BL).flatten(), real.flatten().nonzero()[:, 0], real

    def _spread(self, states: Tensor, spread: Tensor) -> Tensor:
        """[1, N, K*T, E] -> [K*B, N, L, E]."""
        cells = states.squeeze(0).transpose(0, 1).index_select(0, spread)
        num_rows = self.times * (len(self.starts) - 1)
        return cells.view(num_rows, -1, *cells.shape[1:]).transpose(1, 2)

    def _by_copy(self, states: Tensor) -> Tensor:
        """[1, N, K*n, E] -> [K, N, n, E], a view."""
        _, heads, tokens, width = states.shape
        return states.view(heads, self.times, tokens // self.times, width).transpose(0, 1)


def attend_packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention. Packed texts are attended without dropout; a forward
    without `packing` is that of rows, as transformers computes it."""
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mixed: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return mixed
    return packing.attend(query, key, value, kwargs.get("scaling"), at_end=False), None


def can_pack(config: Any, max_length: int) -> bool:
    """Whether a backbone's attention is known to be the plain causal one up to `max_length` tokens."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) or max_length
    upcast = getattr(config, "reorder_and_upcast_attn", False)
    return config.model_type in KINDS and len(kinds) < 2 and window >= max_length and not upcast


def use_packing(model: Any) -> None:
    """Lets a transformers model attend inside packed texts in forwards that are given `packing=`.

    Any other forward must be of rows without padding on the left: the model makes no masks any more.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend_packed)
    model.set_attn_implementation(ATTENTION)


def packed(ids: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor, Packing]:
    """(tokens [1, T], positions [1, T], where the texts lie) of token id lists."""
    lengths = [len(row) for row in ids]
    tokens_T = np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])
    positions_T = np.concatenate([np.arange(length) for length in lengths])
    starts = (0, *np.cumsum(lengths).tolist())
    return (
        torch.from_numpy(tokens_T)[None].to(device),
        torch.from_numpy(positions_T)[None].to(device),
        Packing(starts, device=device),
    )


@dataclass(frozen=True)
class PackedEnds:
    """The last tokens in packed texts: `Ends` of `last_token.py`. Scores only, so no dropout."""

    packing: Packing

    def take(self, states: Tensor) -> Tensor:
        """[1, K*B, width] of [1, K*T, width]."""
        return states.index_select(1, self.packing.last)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        return self.packing.attend(query, key, value, scaling, at_end=True).flatten(2)
