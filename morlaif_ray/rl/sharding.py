"""FSDP2: every rank holds a slice of each weight, gradient and moment (Zhao et al. 2023; torch `fully_shard`).

The rest of the learner works on whole tensors through `whole` and `like`, which are the identity where nothing is
sharded. Calls of `whole` are collective: all ranks make them in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from morlaif_ray.backbone import decoder_layers


def shard(module: nn.Module, device: str) -> None:
    """Shards a module in place over all ranks: its decoder layers one by one, then what is left (embeddings, heads).

    The module may lie on the CPU: each part moves to the rank's device as it is sharded, so that no device ever holds
    the whole model. A value head is a part of its own, being float32 beside weights that may be bfloat16: FSDP2 trains
    one type per part.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = "cuda" if device.startswith("cuda") else "cpu"
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    for layer in decoder_layers(module):
        fully_shard(layer, mesh=mesh)
    value_head = getattr(module, "value_head", None)
    if value_head is not None:
        fully_shard(value_head, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(full: Tensor, pattern: Tensor) -> Tensor:
    """`full` with the device, type and sharding of `pattern`."""
    full = full.to(device=pattern.device, dtype=pattern.dtype)
    if isinstance(pattern, DTensor):
        return distribute_tensor(full, pattern.device_mesh, pattern.placements)
    return full
