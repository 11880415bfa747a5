"""FSDP2 (`fully_shard`) for backbones that do not fit on one device: every rank holds a slice of each weight.

Contract: with one process, or no process group, nothing changes. With R ranks of `torch.distributed` (gloo on CPU,
NCCL on GPUs) each rank computes its share of every batch; losses, gradients and weights are those of one rank up to the
order of float additions. Checkpoints of several ranks hold whole tensors in safetensors, written by rank 0.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morlaif_ray.backbone import decoder_layers
from morlaif_ray.errors import ArtifactError, ConfigError
from morlaif_ray.preference.model import PreferenceModel
from morlaif_ray.tensor_state import load_state, publish, save_state, whole_folder

_SEPARATOR = "|"  # between a parameter's name and the optimizer's key; neither holds it
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model together."""

    rank: int
    size: int

    @property
    def sharded(self) -> bool:
        return self.size > 1


def current_ranks() -> Ranks:
    """From the process group that the caller (Ray Train) has set up; alone where there is none."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return Ranks(0, 1)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


def shard(model: PreferenceModel, ranks: Ranks) -> None:
    """Shards trunk blocks, trunk and head in place; to be called before the optimizer is made.

    ConfigError where frozen and trained weights differ in dtype, which FSDP2 cannot hold in one group.
    """
    if not ranks.sharded:
        return
    if model.is_encoder:
        raise ConfigError(
            "preference.workers_per_trial above 1 shards decoders, and preference.backbone is an encoder; "
            "write workers_per_trial: 1"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    parameters = list(model.model.parameters())
    if len({parameter.dtype for parameter in parameters}) > 1:
        raise ConfigError(
            "preference.workers_per_trial above 1 needs weights of one dtype, but adapters are float32 on a "
            "bfloat16 backbone; write model.dtype: float32"
        )
    mesh = init_device_mesh(parameters[0].device.type, (ranks.size,))
    inner = model.model.get_base_model() if hasattr(model.model, "peft_config") else model.model
    trunk = inner.base_model
    for block in decoder_layers(trunk):
        fully_shard(block, mesh=mesh)
    # `PreferenceModel.forward` calls trunk and head, not the classifier around them.
    fully_shard(trunk, mesh=mesh)
    fully_shard(inner.score, mesh=mesh)


def whole_weights(model: PreferenceModel) -> dict[str, Tensor]:
    """The model's full tensors on the CPU of rank 0 (empty elsewhere); all ranks must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Tensor] = get_model_state_dict(model.model, options=options)  # type: ignore[assignment]
    return found


def save_checkpoint(
    folder: Path,
    model: PreferenceModel,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    ranks: Ranks,
) -> None:
    """Publishes `folder` whole; with several ranks rank 0 writes and all wait for it."""
    if not ranks.sharded:
        save_state(folder, {"model": model.model}, optimizer, extra)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = whole_weights(model)
    state = get_optimizer_state_dict(model.model, optimizer, options=options)
    if ranks.rank == 0:
        _write(folder, weights, state, extra)
    torch.distributed.barrier()


def load_checkpoint(
    folder: Path, model: PreferenceModel, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, Any]:
    """Restores what `save_checkpoint` wrote with the same kind of ranks; returns `extra`."""
    if not ranks.sharded:
        return load_state(folder, {"model": model.model}, optimizer)
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    folder = whole_folder(folder)
    try:
        document = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        weights = load_file(folder / _MODEL)
        moments: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(folder / _OPTIMIZER).items():
            name, _, entry = key.partition(_SEPARATOR)
            moments.setdefault(name, {})[entry] = tensor
        state: dict[str, Any] = {"state": moments, "param_groups": document["param_groups"]}
        extra: dict[str, Any] = document["extra"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        raise ArtifactError(
            f"{folder}: damaged checkpoint ({cause}); remove it and run again"
        ) from None
    set_model_state_dict(model.model, weights, options=options)
    set_optimizer_state_dict(model.model, optimizer, state, options=options)
    return extra


def _write(
    folder: Path,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    from safetensors.torch import save_file

    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary / _MODEL)
    tensors = {
        f"{name}{_SEPARATOR}{key}": value.detach().cpu().contiguous()
        for name, entry in state["state"].items()
        for key, value in entry.items()
    }
    save_file(tensors, temporary / _OPTIMIZER)
    document = {"extra": dict(extra), "param_groups": state["param_groups"]}
    (temporary / _STATE).write_text(json.dumps(document, sort_keys=True), encoding="utf-8")
    publish(temporary, folder)
