"""The last block of a policy at response positions alone: nothing else of it is read.

Its attention needs every token; its feed-forward, two thirds of a block's weights, does not. With n blocks and prompts
as long as responses that saves a third of 1/n of a trunk and of its gradient. Equal to the whole block within rounding.
Legend: B responses, L sequence tokens, N rows that are read, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from morlaif_ray.backbone import in_place_of_last_block, last_block, last_norm

KINDS = (
    "GPT2Block",
    "LlamaDecoderLayer",
    "GemmaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
)
"""Classes of blocks whose arithmetic this module knows. A trunk of any other is computed whole; so are sharded ones,
whose blocks have classes of their own."""


def is_known(trunk: Any) -> bool:
    """Whether this module knows the arithmetic of the trunk's last block."""
    return type(last_block(trunk)).__name__ in KINDS


def states_at(trunk: Any, embedded_BLD: Tensor, index_N: Tensor, **inputs: Any) -> Tensor:
    """Normed states [N, D] at `index_N`, places in the flattened [B * L]; causal, padded on the right.

    `inputs`: what else the trunk's forward needs, such as a packing, which makes [B, L] one row of all texts.
    """
    block = last_block(trunk)
    inputs |= {"inputs_embeds": embedded_BLD, "use_cache": False}
    if not is_known(trunk):
        hidden_BLD: Tensor = trunk(**inputs).last_hidden_state
        return hidden_BLD.flatten(0, 1).index_select(0, index_N)
    rows = _LastBlock(block, index_N)
    with in_place_of_last_block(trunk, rows):
        trunk(**inputs)
    states_ND: Tensor = last_norm(trunk)(rows.take())
    return states_ND


class _LastBlock(nn.Module):
    """Stands in for the last block during one forward pass."""

    def __init__(self, block: Any, index_N: Tensor) -> None:
        super().__init__()
        self.block = block
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
            packing = kwargs.get("packing")
            mixed, _ = block.attn(
                block.ln_1(hidden_BLD),
                attention_mask=mask,
                **({"packing": packing} if packing else {}),
            )
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
