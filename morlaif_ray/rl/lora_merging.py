"""A model with PEFT's LoRA adapters as plain weights, one at a time: no copy of the model, sharded or not.

The learner merges with `merge` to save its policy. A rollout worker, which is sent the adapters alone, merges with the
same function into the base that it loaded itself, so both hold the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from morlaif_ray.rl.sharding import whole


@dataclass(frozen=True)
class Adapter:
    """What one LoRA adapter adds to one weight: scaling * B @ A (Hu et al. 2022)."""

    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scaling: float
    transposed: bool
    """The weight is kept as [in, out] (GPT-2's Conv1D, embeddings)."""

    def delta(self) -> Tensor:
        product = self.b @ self.a
        scaled: Tensor = (product.T if self.transposed else product) * self.scaling
        return scaled


def merge(weight: Tensor, adapters: Iterable[Adapter]) -> Tensor:
    """The weight with the adapters added, each in the adapters' float32 and rounded once; a new tensor."""
    for adapter in adapters:
        weight = (weight + adapter.delta()).to(weight.dtype)
    return weight


def merged_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain model, whole weight with all active adapters added) of a PEFT model's base.

    Collective where the model is sharded. Weights that two layers share (tied embeddings) come once, with the adapters
    of both.
    """
    for name, parameter, layers in _parameters(model):
        yield name, merge(whole(parameter.detach()), _adapters(layers))


def adapted_parameters(model: Any) -> Iterator[tuple[str, list[Adapter]]]:
    """(name in the plain model, its adapters in the order in which they are added) of a PEFT model's base.

    All that such a model learns. Collective where the model is sharded.
    """
    for name, parameter, layers in _parameters(model):
        assert not parameter.requires_grad, f"'{name}' learns without being an adapter"
        adapters = list(_adapters(layers))
        if adapters:
            yield name, adapters


def _parameters(model: Any) -> Iterator[tuple[str, nn.Parameter, list[Any]]]:
    """(name in the plain model, parameter, LoRA layers around it)."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    layers: dict[int, list[Any]] = {}
    for module in base.modules():
        if isinstance(module, LoraLayer):
            layers.setdefault(id(module.get_base_layer().weight), []).append(module)
    for name, parameter in base.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter, layers.get(id(parameter), [])


def _adapters(layers: Iterable[Any]) -> Iterator[Adapter]:
    """The active adapters of these layers, whole."""
    for layer in layers:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                transposed = layer.fan_in_fan_out
            elif name in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
                transposed = True
            else:
                continue
            yield Adapter(whole(a.detach()), whole(b.detach()), layer.scaling[name], transposed)
