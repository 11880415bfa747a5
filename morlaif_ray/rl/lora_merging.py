"""A model with PEFT's LoRA adapters as plain weights, one at a time: no copy of the model, sharded or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from morlaif_ray.rl.sharding import whole


def merged_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain model, whole weight with all active adapters added) of a PEFT model's base.

    W + scaling * B @ A (Hu et al. 2022), transposed where the layer keeps [in, out] (GPT-2's Conv1D). Collective where
    the model is sharded. Weights that two layers share (tied embeddings) come once, with the adapters of both.
    """
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    layers: dict[int, list[Any]] = {}
    for module in base.modules():
        if isinstance(module, LoraLayer):
            layers.setdefault(id(module.get_base_layer().weight), []).append(module)
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        weight = whole(parameter.detach())
        for layer in layers.get(id(parameter), []):
            for adapter in layer.active_adapters:
                delta = _delta(layer, adapter)
                if delta is not None:
                    # Added in the adapters' float32, rounded once.
                    weight = (weight + delta).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def _delta(layer: Any, adapter: str) -> Tensor | None:
    """What the adapter adds to the layer's weight; None where the layer does not have it."""
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        transposed = layer.fan_in_fan_out
    elif adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        transposed = True
    else:
        return None
    delta = whole(b.detach()) @ whole(a.detach())
    scaled: Tensor = (delta.T if transposed else delta) * layer.scaling[adapter]
    return scaled
