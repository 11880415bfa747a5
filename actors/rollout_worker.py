"""A generation engine with a process: samples responses, and adopts new policy weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from actors.spawning import spawn
from actors.stored_rollouts import Arrays, Told, split
from actors.training import set_single_thread
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.rl.adapter_transfer import unpack
from morlaif_ray.rl.generation import GenerationEngine, SamplingSettings, TransformersEngine
from morlaif_ray.rl.vllm_engine import (
    VllmEngine,
    VllmSettings,
)
from morlaif_ray.rl.weight_broadcast import Announcement, Rendezvous
from morlaif_ray.rl.weight_transfer import WeightBucket
from morlaif_ray.types import GenerationRequest, RolloutBatch
from morlaif_ray.vllm_environment import CPU_ENVIRONMENT, ENVIRONMENT


class RolloutWorker:
    """Plain class; `spawn_rollout_worker` gives it a process."""

    def __init__(
        self,
        model_path: str,
        dtype: str = "float32",
        device: str = "cpu",
        vllm: VllmSettings | None = None,
    ) -> None:
        set_single_thread()
        self.engine: GenerationEngine
        if vllm is not None:
            self.engine = VllmEngine(model_path, dtype=dtype, settings=vllm)
            # Whoever supervises this actor then sees it die, and starts it again with all its slices.
            self.engine.when_lost(lambda: os._exit(1))
        else:
            engine = TransformersEngine.from_path(model_path, dtype=dtype)
            engine.model.to(device)
            self.engine = engine

    def ping(self) -> int:
        """The policy version held."""
        return self.engine.policy_version

    def generate(
        self, requests: Sequence[GenerationRequest], settings: SamplingSettings
    ) -> RolloutBatch:
        return self.engine.generate(requests, settings)

    def generate_stored(
        self, requests: Sequence[GenerationRequest], settings: SamplingSettings
    ) -> tuple[Told, Arrays]:
        """The same in two results, so that tokens and log-probabilities need not pass the driver."""
        return split(self.engine.generate(requests, settings))

    def load_model(self, model_path: str) -> int:
        """Replaces the whole model, for evaluation of several policies; returns the version held (0)."""
        self.engine.load_model(model_path)
        return self.engine.policy_version

    def load_weights(self, weights: Mapping[str, Any], version: int) -> int:
        """Adopts a full set of weights; returns the version now held."""
        self.engine.load_weights(weights, version)
        return version

    def load_buckets(self, version: int, *buckets: WeightBucket) -> int:
        """Adopts the weights, or the adapters, of these buckets once all are verified; returns their version.

        Each bucket is an argument: Ray then brings it here before the call and lends views of shared memory, while a
        list of references would be asked for one after the other.
        """
        weights: dict[str, Any] = {}
        base: int | None = None
        last = False
        for index, bucket in enumerate(buckets):
            weights |= bucket.verified(version, index).weights
            base, last = bucket.base, bucket.is_last
        assert last, f"{len(buckets)} weight buckets of version {version}, the last one is missing"
        if base is None:
            self.engine.load_weights(weights, version)
        else:
            self.engine.load_adapters(unpack(weights), base, version)
        return version

    def join_transfer(self, where: Rendezvous) -> str:
        """Joins the learner's group; the GPU that this engine computes on ('' for a CPU)."""
        self.engine.join_transfer(where)
        return self.engine.gpu_uuid() if where.backend == "ipc" else ""

    def receive_weights(self, announcement: Announcement) -> int:
        """Takes its part in the learner's `send_weights`; returns the version now held."""
        self.engine.receive_weights(announcement)
        return self.engine.policy_version


def spawn_rollout_worker(
    model_path: str, policy: PolicyConfig, *, engine: str, dtype: str, num_cpus: float
) -> Any:
    """An actor handle of a `RolloutWorker` that reserves the given CPUs and the configured GPUs.

    Args:
        engine: `transformers` or `vllm`, what `engine_of` says.
        num_cpus: for each process of the engine.
    """
    gpus = policy.rollout_gpus_per_worker
    device = "cuda" if gpus else "cpu"
    if engine == "transformers":
        return spawn(RolloutWorker, model_path, dtype, device, num_cpus=num_cpus, num_gpus=gpus)
    slices = policy.engine_slices
    beside = {
        "tensor_parallel_size": slices,
        "weight_transfer": policy.direct_transfer or "host",
    }
    vllm = VllmSettings(**policy.vllm.model_dump() | beside)
    return spawn(
        RolloutWorker,
        model_path,
        dtype,
        device,
        vllm,
        num_cpus=num_cpus * slices,
        num_gpus=gpus,
        # Every response in flight is a waiting call; two more for control.
        max_concurrency=vllm.max_num_seqs + 2,
        environment=ENVIRONMENT | ({} if gpus else CPU_ENVIRONMENT),
    )
