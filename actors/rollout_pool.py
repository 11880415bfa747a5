"""Several rollout actors behind one call: least-loaded dispatch, and weights that every one of them holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from actors.engines import engine_of
from actors.placement import ROLLOUT_CPUS
from actors.rollout_worker import spawn_rollout_worker
from actors.stored_rollouts import StoredRollouts, Told
from actors.supervision import (
    Call,
    InputLostError,
    SupervisedActor,
    call_all,
    cause_of,
    input_is_lost,
    input_lost,
    map_over,
    wait_all_ready,
)
from actors.weight_exchange import Answer, WeightExchange, fetch_buckets
from morlaif_ray.config import Config
from morlaif_ray.errors import ActorLostError
from morlaif_ray.rl.generation import SamplingSettings
from morlaif_ray.rl.weight_transfer import in_buckets
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
        self._policy = config.policy
        self.engine = engine_of(config)
        # vLLM batches by itself: a prompt goes to the worker with the fewest responses in flight.
        self._in_flight = config.policy.vllm.max_num_seqs if self.engine == "vllm" else 2

        def spawn() -> Any:
            return spawn_rollout_worker(
                self._model_path,
                config.policy,
                engine=self.engine,
                dtype=self._dtype,
                num_cpus=ROLLOUT_CPUS,
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
        try:
            wait_all_ready(self._workers)
        except ActorLostError as error:
            if self.engine == "transformers":
                raise
            raise ActorLostError(
                f"{error.message}; 'policy.engine: transformers' samples without vLLM"
            ) from None
        self._exchange = WeightExchange(self._workers, config.policy)

    def _refresh(self, handle: Any) -> None:
        import ray

        if self._weights is not None:
            method, arguments = self._loading()
            timeout_s = self._policy.call_timeout_s
            try:
                ray.get(getattr(handle, method).remote(*arguments), timeout=timeout_s)
            except ray.exceptions.RayTaskError as error:
                if input_is_lost(error):
                    raise InputLostError(input_lost("rollout worker", method)) from None
                raise cause_of(error) from None

    def _loading(self) -> tuple[str, tuple[Any, ...]]:
        """(method, arguments) that bring a worker to the current weights."""
        weights = self._weights() if callable(self._weights) else self._weights
        if isinstance(weights, list):
            return "load_buckets", (self._version, *weights)
        return "load_weights", (self._weights, self._version)

    def map(
        self,
        chunks: Sequence[Sequence[GenerationRequest]],
        settings: SamplingSettings,
        on_result: Callable[[int, RolloutBatch], None] | None = None,
    ) -> list[RolloutBatch]:
        """One batch per chunk, in order; chunks go to the least loaded worker."""
        items = [(list(chunk), settings) for chunk in chunks]
        return map_over(self._workers, "generate", items, on_result, self._in_flight)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        settings: SamplingSettings,
        on_result: Callable[[int, RolloutBatch], None] | None = None,
    ) -> RolloutBatch:
        """All requests as one batch. `on_result(first row, part)` hears of finished parts, in no particular order."""
        parts = self._parts(len(requests))
        first = [part[0] for part in parts]
        heard = on_result and (lambda index, batch: on_result(first[index], batch))
        chunks = [[requests[i] for i in part] for part in parts]
        return join_batches(self.map(chunks, settings, heard))

    def generate_stored(
        self,
        requests: Sequence[GenerationRequest],
        settings: SamplingSettings,
        on_result: Callable[[int, Told], None] | None = None,
    ) -> StoredRollouts:
        """The same batch with its arrays in the object store: they never pass this process."""
        parts = self._parts(len(requests))
        items = [([requests[i] for i in part], settings) for part in parts]
        heard = on_result and (lambda index, told: on_result(parts[index][0], told))
        made = map_over(
            self._workers, "generate_stored", items, heard, self._in_flight, second_stays=True
        )
        return StoredRollouts.join(made)

    def _parts(self, num: int) -> list[range]:
        """Rows that travel together. vLLM: the samples of a prompt, which share its keys and values; else
        `rollout_chunk` rows, or an even share of a worker. They never depend on load: the bits of a response may
        depend on its neighbours."""
        size = self._policy.samples_per_prompt if self.engine == "vllm" else None
        size = size or self._policy.rollout_chunk
        if size is not None:
            return [range(start, min(start + size, num)) for start in range(0, num, size)]
        shares = np.array_split(np.arange(num), len(self._workers))
        return [range(int(share[0]), int(share[-1]) + 1) for share in shares if len(share)]

    def generate_on_each(
        self, requests: Sequence[GenerationRequest], settings: SamplingSettings
    ) -> list[RolloutBatch]:
        """The same requests to every worker; one batch per worker."""
        return call_all(
            [Call(worker, "generate", (list(requests), settings)) for worker in self._workers]
        )

    def load_weights(self, weights: Any, version: int) -> None:
        """Gives every worker the weights: a list of references to buckets (of all weights, or of adapters to what the
        workers started with), or a plain dict (or a reference to one). InputLostError (here and wherever a worker is
        started again) where the buckets are gone: then the workers hold unlike weights until the next call."""
        self._weights, self._version = weights, version
        method, arguments = self._loading()
        held = call_all([Call(worker, method, arguments) for worker in self._workers])
        assert set(held) == {version}, f"workers hold versions {sorted(held)}, expected {version}"

    @property
    def sends_directly(self) -> bool:
        """Whether weights are to be sent past the object store."""
        return self._policy.direct_transfer is not None and not self._exchange.is_given_up

    def send_weights(self, learner: Any, version: int, answer: Answer) -> str | None:
        """Has the learner send its weights to every worker directly (`policy.weight_transfer`). None, or why that
        failed in one line: then the workers hold unlike weights, and `load_weights` has to follow."""
        failure = self._exchange.send(learner, version, answer)
        if failure is None:
            policy, self._version = self._policy, version
            max_bytes = policy.weight_bucket_mb << 20
            # A worker that is started again is not in the group: for it the learner is asked once more.
            self._weights = partial(
                fetch_buckets, learner, max_bytes, version, policy.call_timeout_s
            )
        return failure

    def load_model(self, model_path: str) -> None:
        """Replaces the model of every worker (evaluation of several policies)."""
        self._weights, self._version, self._model_path = None, 0, model_path
        call_all([Call(worker, "load_model", (model_path,)) for worker in self._workers])

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


def weights_reference(
    weights: Mapping[str, np.ndarray[Any, Any]],
    version: int = 0,
    max_bytes: int = 256 << 20,
    base: int | None = None,
) -> list[Any]:
    """Puts weights (or adapters of `base`) into the object store once, for all workers (zero copy on the same node)."""
    import ray

    return [ray.put(bucket) for bucket in in_buckets(weights, version, max_bytes, base)]
