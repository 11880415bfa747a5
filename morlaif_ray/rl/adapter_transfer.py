"""LoRA adapters on their way from the learner to rollout workers that hold the base weights themselves.

    learner   pack(adapted_parameters(model)) -> arrays, a fraction of the weights; they travel in `WeightBucket`s
    worker    BaseWeights.merged(unpack(arrays)) -> the weights that the learner would merge, bit for bit

Both name the base by the checksum of its weights, so adapters of one model never meet another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morlaif_ray.errors import ArtifactError
from morlaif_ray.rl.lora_merging import Adapter, merge
from morlaif_ray.rl.weight_transfer import Array, add_to_checksum

PARTS = ("a", "b", "scaling", "transposed")
"""An adapter travels as four arrays, named '<weight>/<number>/<part>'."""


def pack(adapters: Iterable[tuple[str, Sequence[Adapter]]]) -> dict[str, Array]:
    """The adapters of each named weight, as arrays. Views where they lie on the CPU: use them before the next step."""
    arrays: dict[str, Array] = {}
    for name, of_weight in adapters:
        for index, adapter in enumerate(of_weight):
            values = (
                adapter.a.cpu().numpy(),
                adapter.b.cpu().numpy(),
                np.array(adapter.scaling, dtype=np.float64),
                np.array(adapter.transposed),
            )
            for part, value in zip(PARTS, values, strict=True):
                arrays[f"{name}/{index}/{part}"] = value
    return arrays


def unpack(arrays: Mapping[str, Array]) -> dict[str, list[Adapter]]:
    """Weight -> its adapters in order; inverse of `pack`. The tensors are copies: shared memory is read-only."""
    adapters: dict[str, list[Adapter]] = {}
    for key in arrays:
        prefix, _, part = key.rpartition("/")
        if part != PARTS[0]:
            continue
        a, b, scaling, transposed = (arrays[f"{prefix}/{each}"] for each in PARTS)
        adapter = Adapter(
            torch.from_numpy(np.array(a)),
            torch.from_numpy(np.array(b)),
            float(scaling),
            bool(transposed),
        )
        adapters.setdefault(prefix.rpartition("/")[0], []).append(adapter)
    return adapters


def base_checksum(parameters: Iterable[tuple[str, Tensor]]) -> int:
    """CRC-32 of a plain model's named parameters, in their order and type."""
    checksum = 0
    for name, parameter in parameters:
        checksum = add_to_checksum(checksum, name, _raw(parameter))
    return checksum


class BaseWeights:
    """The weights that a worker loaded, kept on the CPU so that adapters can be merged into them again and again."""

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]], *, wanted: Iterable[str] | None = None
    ) -> None:
        """`wanted`: names of the weights to copy; None: all are kept, and no one else may change them."""
        named = {name: parameter.detach() for name, parameter in parameters}
        self.checksum = base_checksum(named.items())
        self.names = tuple(named)
        if wanted is None:
            self._kept = named
        else:
            self._kept = {n: named[n].to("cpu", copy=True) for n in wanted if n in named}

    @property
    def num_bytes(self) -> int:
        """Of the kept weights."""
        return sum(weight.nbytes for weight in self._kept.values())

    def check(self, expected: int, adapters: Iterable[str]) -> None:
        """ArtifactError where the learner's base is another one; KeyError where it has no such weight."""
        if self.checksum != expected:
            raise ArtifactError(
                f"weight refresh: this rollout worker's base weights (checksum {self.checksum:08x}) are not the "
                f"learner's ({expected:08x}): the model folder differs between nodes or was changed meanwhile; give "
                f"all nodes the same folder and run the same command again"
            )
        unknown = sorted(set(adapters) - set(self.names))
        if unknown:
            raise KeyError(f"weight '{unknown[0]}' is not a parameter of the rollout model")

    def merged(
        self, adapters: Mapping[str, Sequence[Adapter]], device: Any = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, weight on `device`) of every kept weight, one at a time; those without adapters as they are."""
        assert adapters.keys() <= self._kept.keys(), "adapters on a weight that was not kept"
        for name, weight in self._kept.items():
            there = [
                Adapter(x.a.to(device), x.b.to(device), x.scaling, x.transposed)
                for x in adapters.get(name, ())
            ]
            yield name, merge(weight.to(device), there)


def _raw(tensor: Tensor) -> Array:
    """The tensor's bytes as an array that also shows shape and type: bfloat16 is unknown to NumPy."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)
    made: Array = tensor.numpy()
    return made
