"""Training state on disk without pickle: safetensors for tensors, JSON for everything else.

`save_state` writes to a temporary folder, fsyncs and renames it, so a checkpoint that exists is whole. `load_state`
restores parameters, optimizer moments and step counts bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from morlaif_ray.durability import sync_path
from morlaif_ray.errors import ArtifactError, explain_os_errors


def save_state(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None,
    extra: Mapping[str, Any],
) -> None:
    """Publishes `folder` with `<name>.safetensors` per module, `optimizer.safetensors` and `state.json`."""
    with explain_os_errors(folder):
        temporary = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, module in modules.items():
            save_file(_unique_tensors(module), temporary / f"{name}.safetensors")
        document: dict[str, Any] = {"extra": dict(extra)}
        if optimizer is not None:
            tensors, plain = _flatten_optimizer(optimizer)
            save_file(tensors, temporary / "optimizer.safetensors")
            document["optimizer"] = plain
        path = temporary / "state.json"
        path.write_text(json.dumps(document, sort_keys=True), encoding="utf-8")
        publish(temporary, folder)


def load_state(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, Any]:
    """Restores what `save_state` wrote into the given objects and returns `extra`."""
    folder = whole_folder(folder)
    try:
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name, module in modules.items():
            stored = load_file(folder / f"{name}.safetensors")
            module.load_state_dict(stored, strict=False)
            absent = set(_unique_tensors(module)) - set(stored)
            if absent:
                raise ArtifactError(
                    f"{folder}: tensor '{sorted(absent)[0]}' is missing; remove the folder"
                )
        if optimizer is not None:
            _restore_optimizer(
                optimizer, load_file(folder / "optimizer.safetensors"), document["optimizer"]
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        raise ArtifactError(
            f"{folder}: damaged checkpoint ({cause}); remove it and run again"
        ) from None
    extra: dict[str, Any] = document["extra"]
    return extra


def state_exists(folder: Path) -> bool:
    return (whole_folder(folder) / "state.json").is_file()


def publish(temporary: Path, folder: Path) -> None:
    """Syncs `temporary` with its files and puts it in place of `folder`; `whole_folder` finds one after any kill."""
    for path in temporary.iterdir():
        sync_path(path)
    sync_path(temporary)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(folder)
    sync_path(folder.parent)


def whole_folder(folder: Path) -> Path:
    """A kill between the two renames of `publish` leaves the previous checkpoint under its old name."""
    old = folder.with_name(f".{folder.name}.old")
    return old if not folder.exists() and old.exists() else folder


def _unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Named tensors, tied ones once (safetensors refuses shared memory)."""
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.detach().cpu().contiguous()
    return kept


def _flatten_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"state": {}, "param_groups": state["param_groups"]}
    for index, entry in state["state"].items():
        plain["state"][str(index)] = {}
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().clone().contiguous()
            else:
                plain["state"][str(index)][key] = value
    return tensors, plain


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entry) for index, entry in plain["state"].items()
    }
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
