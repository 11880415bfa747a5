"""Several rollout actors behind one call: least-loaded dispatch, and weights that every one of them holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from actors.placement import ROLLOUT_CPUS
from actors.rollout_worker import spawn_rollout_worker
from actors.supervision import Call, SupervisedActor, call_all, map_over, wait_all_ready
from morlaif_ray.config import Config
from morlaif_ray.rl.generation import SamplingSettings
from morlaif_ray.types import GenerationRequest, RolloutBatch


class RolloutPool:
    """Owns its workers; `close()` ends them. A worker that restarts rejoins only with the current weights."""

    def __init__(
        self, config: Config, model_path: str, num_workers: int, say: Callable[[str], None]
    ) -> None:
        self._weights: Any = None
        self._version = 0
        self._model_path = model_path
        self._dtype = "float32" if config.model.kind == "scratch" else config.model.dtype
        gpus = config.policy.rollout_gpus_per_worker

        def spawn() -> Any:
            return spawn_rollout_worker(
                self._model_path, dtype=self._dtype, num_cpus=ROLLOUT_CPUS, num_gpus=gpus
            )

        self._workers = [
            SupervisedActor(
                f"rollout worker {index}",
                spawn,
                max_restarts=config.policy.max_restarts,
                start_timeout_s=config.cluster.start_timeout_s,
                call_timeout_s=config.policy.call_timeout_s,
                after_start=self._refresh,
                say=say,
            )
            for index in range(num_workers)
        ]
        wait_all_ready(self._workers)

    def _refresh(self, handle: Any) -> None:
        import ray

        if self._weights is not None:
            ray.get(handle.load_weights.remote(self._weights, self._version), timeout=120.0)

    def map(
        self,
        chunks: Sequence[Sequence[GenerationRequest]],
        settings: SamplingSettings,
        on_result: Callable[[int, RolloutBatch], None] | None = None,
    ) -> list[RolloutBatch]:
        """One batch per chunk, in order."""
        items = [(list(chunk), settings) for chunk in chunks]
        return map_over(self._workers, "generate", items, on_result)

    def generate(
        self, requests: Sequence[GenerationRequest], settings: SamplingSettings
    ) -> RolloutBatch:
        """All requests as one batch, split evenly over the workers."""
        parts = [
            list(part)
            for part in np.array_split(np.arange(len(requests)), len(self._workers))
            if len(part)
        ]
        return join_batches(self.map([[requests[i] for i in part] for part in parts], settings))

    def load_weights(self, weights: Any, version: int) -> None:
        """Gives every worker the weights behind an object reference (or a plain dict)."""
        self._weights, self._version = weights, version
        call_all([Call(worker, "load_weights", (weights, version)) for worker in self._workers])

    def load_model(self, model_path: str) -> None:
        """Replaces the model of every worker (evaluation of several policies)."""
        self._weights, self._version, self._model_path = None, 0, model_path
        call_all(
            [Call(worker, "load_model", (model_path, self._dtype)) for worker in self._workers]
        )

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()


def join_batches(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """Concatenates batches of one policy version, padding to the longest."""
    if len(batches) == 1:
        return batches[0]
    versions = {batch.policy_version for batch in batches}
    assert len(versions) == 1, f"batches of several policy versions: {sorted(versions)}"

    def padded(name: str) -> np.ndarray[Any, Any]:
        arrays = [getattr(batch, name) for batch in batches]
        width = max(array.shape[1] for array in arrays)
        return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in arrays])

    return RolloutBatch(
        prompts=tuple(text for batch in batches for text in batch.prompts),
        responses=tuple(text for batch in batches for text in batch.responses),
        tokens_BL=padded("tokens_BL"),
        prompt_lengths_B=np.concatenate([batch.prompt_lengths_B for batch in batches]),
        response_lengths_B=np.concatenate([batch.response_lengths_B for batch in batches]),
        logprobs_BT=padded("logprobs_BT"),
        truncated_B=np.concatenate([batch.truncated_B for batch in batches]),
        policy_version=batches[0].policy_version,
    )


def weights_reference(weights: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """Puts weights into the object store once, for all workers (zero copy on the same node)."""
    import ray

    return ray.put(dict(weights))
