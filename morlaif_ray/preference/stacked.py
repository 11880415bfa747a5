"""Layers under a stack of LoRA adapters, and the blocks that carry them. Scores only: nothing here has a gradient.

Legend: K adapters of a pass, B texts, T tokens of all texts (packed, see `packing.py`), I and O widths of a layer, R
rank, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from morlaif_ray.backbone.packing import PackedEnds, Packing
from morlaif_ray.preference.branching import Tail

CPU_TOKENS = 1024
"""Tokens, all adapters of a pass together, that a CPU computes at a time: more do not fit its caches."""


class Chosen:
    """The adapters of the pass under way, shared by all stacked layers of a bank."""

    def __init__(self, num_adapters: int) -> None:
        self.rows: Sequence[int] = range(num_adapters)

    def of(self, stacked: Tensor) -> Tensor:
        """The wanted rows of [all adapters, ...]; a view where they are neighbours."""
        first, num = self.rows[0], len(self.rows)
        if list(self.rows) == list(range(first, first + num)):
            return stacked[first : first + num]
        return stacked[list(self.rows)]


class StackedLora(nn.Module):
    """A linear layer whose input rows are those of K adapters, one behind another: x W + (x A_k) B_k for each.

    Leading dimensions of any kind: only their order, adapter by adapter, matters.
    """

    def __init__(self, base: nn.Module, down_KIR: Tensor, up_KRO: Tensor, chosen: Chosen) -> None:
        super().__init__()
        self.base = base
        self.down_KIR = nn.Parameter(down_KIR, requires_grad=False)
        self.up_KRO = nn.Parameter(up_KRO, requires_grad=False)
        self._chosen = chosen

    def forward(self, rows: Tensor) -> Tensor:
        down_KIR, up_KRO = self._chosen.of(self.down_KIR), self._chosen.of(self.up_KRO)
        inputs = rows.reshape(len(down_KIR), -1, rows.shape[-1])
        if self._worth_merging(inputs):
            return self._merged(inputs, down_KIR, up_KRO).view(*rows.shape[:-1], -1)
        outputs: Tensor = self.base(rows)
        flat = outputs.view(*inputs.shape[:2], -1)
        # As PEFT does: a bfloat16 backbone under float32 adapters keeps the low-rank term in float32.
        inner = torch.bmm(inputs.to(down_KIR.dtype), down_KIR)
        if flat.dtype == up_KRO.dtype:
            flat.baddbmm_(inner, up_KRO)
        else:
            flat.add_(torch.bmm(inner, up_KRO).to(flat.dtype))
        return outputs

    def _worth_merging(self, inputs: Tensor) -> bool:
        """Whether W + A_k B_k costs less than the low-rank terms: on a CPU both cost the memory that they touch.

        Not in bfloat16, where the sum would lose the adapter's last digits.
        """
        num_in, num_out = self.down_KIR.shape[1], self.up_KRO.shape[2]
        if inputs.device.type != "cpu" or inputs.dtype != torch.float32:
            return False
        if type(self.base).__name__ not in ("Linear", "Conv1D"):
            return False
        return inputs.shape[1] * (num_in + 2 * num_out) > num_in * num_out

    def _merged(self, inputs: Tensor, down_KIR: Tensor, up_KRO: Tensor) -> Tensor:
        base: Any = self.base
        outputs = inputs.new_empty(*inputs.shape[:2], up_KRO.shape[2])
        for row, (down_IR, up_RO) in enumerate(zip(down_KIR, up_KRO, strict=True)):
            if isinstance(base, nn.Linear):  # stored [O, I]
                merged_IO = torch.addmm(base.weight, up_RO.T, down_IR.T).T
            else:
                merged_IO = torch.addmm(base.weight, down_IR, up_RO)
            outputs[row] = nn.functional.linear(inputs[row], merged_IO.t())
        return outputs if base.bias is None else outputs.add_(base.bias)


class PackedTail(Tail):
    """All blocks: those below the first adapted one once, the others once per adapter, some adapters at a time."""

    packing: Packing
    """Where the texts of the pass lie; set before the forward."""

    def __init__(
        self, blocks: Sequence[nn.Module], norm: nn.Module, first: int, chosen: Chosen
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.first = first
        self._chosen = chosen

    def forward(self, hidden_1TD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        blocks, shared, everyone = list(self.blocks), hidden_1TD, self._chosen.rows
        for block in blocks[: self.first]:
            shared = block(shared, *args, packing=self.packing, **kwargs)
        size = len(everyone)
        if shared.device.type == "cpu":
            size = max(1, CPU_TOKENS // self.packing.num_tokens)
        self.states = []
        for start in range(0, len(everyone), size):
            self._chosen.rows = everyone[start : start + size]
            packing = replace(self.packing, times=len(self._chosen.rows))
            ends = PackedEnds(packing)
            tiled = {name: _tiled(value, packing) for name, value in kwargs.items()}
            state = self.run(
                blocks[self.first :], _tiled(shared, packing), ends, *args, packing=packing, **tiled
            )
            self.states.extend(self.norm(state).view(packing.times, -1, state.shape[-1]))
        self._chosen.rows = everyone
        return hidden_1TD


def _tiled(value: Any, packing: Packing) -> Any:
    """Repeats what has a row per token; what is the same for all tokens stays as it is."""
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == packing.num_tokens:
        return value.repeat(1, packing.times, *([1] * (value.ndim - 2)))
    if isinstance(value, tuple):
        return tuple(_tiled(item, packing) for item in value)
    return value
