"""A generation engine with a process: samples responses, and adopts new policy weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.spawning import spawn
from actors.training import set_single_thread
from morlaif_ray.rl.generation import SamplingSettings, TransformersEngine
from morlaif_ray.types import GenerationRequest, RolloutBatch


class RolloutWorker:
    """Plain class; `spawn_rollout_worker` gives it a process."""

    def __init__(self, model_path: str, dtype: str = "float32", device: str = "cpu") -> None:
        set_single_thread()
        self.engine = TransformersEngine.from_path(model_path, dtype=dtype)
        self.engine.model.to(device)

    def ping(self) -> int:
        """The policy version held."""
        return self.engine.policy_version

    def generate(
        self, requests: Sequence[GenerationRequest], settings: SamplingSettings
    ) -> RolloutBatch:
        return self.engine.generate(requests, settings)

    def load_model(self, model_path: str, dtype: str = "float32") -> int:
        """Replaces the whole model, for evaluation of several policies; returns the version held (0)."""
        device = next(self.engine.model.parameters()).device
        self.engine = TransformersEngine.from_path(model_path, dtype=dtype)
        self.engine.model.to(device)
        return self.engine.policy_version

    def load_weights(self, weights: Mapping[str, Any], version: int) -> int:
        """Adopts a full set of weights; returns the version now held."""
        self.engine.load_weights(weights, version)
        return version


def spawn_rollout_worker(model_path: str, *, dtype: str, num_cpus: float, num_gpus: float) -> Any:
    """An actor handle of a `RolloutWorker` that reserves the given CPUs and GPUs."""
    device = "cuda" if num_gpus else "cpu"
    return spawn(RolloutWorker, model_path, dtype, device, num_cpus=num_cpus, num_gpus=num_gpus)
