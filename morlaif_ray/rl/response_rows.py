"""The last block of a policy at response positions alone: nothing else of it is read.

Its attention needs every token; its feed-forward, two thirds of a block's weights, does not. With n blocks and prompts
as long as responses that saves a third of 1/n of a trunk and of its gradient. Equal to the whole block within rounding.
Legend: B responses, L sequence tokens, N rows that are read, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DECODERS = {
    "GPT2Block": ("h", "ln_f"),
    "LlamaDecoderLayer": ("layers", "norm"),
    "GemmaDecoderLayer": ("layers", "norm"),
    "MistralDecoderLayer": ("layers", "norm"),
    "Qwen2DecoderLayer": ("layers", "norm"),
}
"""Class of a block -> where its trunk keeps the blocks and the norm after them. Any other trunk is computed whole; so
are sharded ones, whose blocks have classes of their own."""


def states_at(trunk: Any, embedded_BLD: Tensor, index_N: Tensor) -> Tensor:
    """Normed states [N, D] at `index_N`, places in the flattened [B * L]; causal, padded on the right."""
    with _last_block_at(trunk, index_N) as last:
        hidden_BLD: Tensor = trunk(inputs_embeds=embedded_BLD, use_cache=False).last_hidden_state
        if last is not None:
            states_ND: Tensor = last.norm(last.take())
            return states_ND
    return hidden_BLD.flatten(0, 1).index_select(0, index_N)


class _LastBlock(nn.Module):
    """Stands in for the last block during one forward pass."""

    def __init__(self, block: Any, norm: Any, index_N: Tensor) -> None:
        super().__init__()
        self.block = block
        self.norm = norm
        self._index_N = index_N
        self._states_ND: Tensor | None = None

    def forward(self, hidden_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hands its input on: what the trunk makes of that is not read."""
        run = partial(self._run, *args, **kwargs)
        # Where the block would recompute itself in the backward pass, so does this.
        again = getattr(self.block, "gradient_checkpointing", False) and self.block.training
        self._states_ND = (
            checkpoint(run, hidden_BLD, use_reentrant=False) if again else run(hidden_BLD)
        )
        return hidden_BLD

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        """`args`: those of the block after its states, then these."""
        block, (*others, hidden_BLD) = self.block, args
        if type(block).__name__ == "GPT2Block":
            mask = others[1] if len(others) > 1 else kwargs.get("attention_mask")
            mixed, _ = block.attn(block.ln_1(hidden_BLD), attention_mask=mask)
            norm = block.ln_2
        else:
            mixed, _ = block.self_attn(block.input_layernorm(hidden_BLD), *others, **kwargs)
            norm = block.post_attention_layernorm
        rows_ND = (hidden_BLD + mixed).flatten(0, 1).index_select(0, self._index_N)
        made: Tensor = rows_ND + block.mlp(norm(rows_ND))
        return made

    def take(self) -> Tensor:
        states_ND, self._states_ND = self._states_ND, None
        assert states_ND is not None, "the trunk did not call its last block"
        return states_ND


@contextmanager
def _last_block_at(trunk: Any, index_N: Tensor) -> Iterator[_LastBlock | None]:
    """None where the trunk is computed whole. Outside, the trunk is as it was."""
    for kind, (blocks_name, norm_name) in DECODERS.items():
        blocks = getattr(trunk, blocks_name, None)
        if blocks and type(blocks[-1]).__name__ == kind:
            whole = blocks[-1]
            blocks[-1] = last = _LastBlock(whole, getattr(trunk, norm_name), index_N)
            try:
                yield last
            finally:
                blocks[-1] = whole
            return
    yield None
