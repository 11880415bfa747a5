"""The processes that train one policy together. One rank: nothing is sent anywhere.

All ranks see the whole batch and take their share of its rows; sums over ranks, never means, make the result that of
one big batch. gloo carries them on CPU, NCCL on GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

BUCKET_BYTES = 64 * 2**20
"""Gradients travel in flat pieces of about this size: few messages, little extra memory."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among `size`. More than one need an initialised default process group."""

    rank: int = 0
    size: int = 1

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replaces the tensor by its sum over ranks, on every rank the same bits."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its sum over ranks; one that a rank does not have counts as 0."""
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            torch.distributed.all_reduce(flat)
            pieces = flat.split([grad.numel() for grad in grads])
            for parameter, piece in zip(bucket, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Consecutive parameters of one type, up to BUCKET_BYTES together."""
    made: list[list[torch.nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        if not made or size + num_bytes > BUCKET_BYTES or made[-1][0].dtype != parameter.dtype:
            made.append([])
            size = 0
        made[-1].append(parameter)
        size += num_bytes
    return made


def join_ranks(rank: int, size: int, address: str, device: str, timeout_s: float) -> Ranks:
    """Waits for all ranks at `address` (host:port, served by rank 0); RuntimeError after `timeout_s`."""
    torch.distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    return Ranks(rank, size)


def leave_ranks() -> None:
    """Ends this process's part in the group; the others' pending sums then fail at once instead of timing out."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
