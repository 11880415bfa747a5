"""Sampling by vLLM inside the calling process: continuous batching, several callers at once.

    engine = VllmEngine("model", dtype="float32", settings=VllmSettings())
    batch = engine.generate(requests, SamplingSettings(max_new_tokens=64))

The engine runs in this process (no child that could outlive it) and re-seeds torch's global generator, so it must not
share a process with a learner. A model that needs several GPUs (`VllmSettings.tensor_parallel_size`) is sliced over as
many child processes on this machine; they end when this one does. A request's seed alone decides its response, in
float32 to the bit whatever else is in the batch. Seeds mean other numbers than with `TransformersEngine`: both engines
sample the same distribution, not the same responses. The reasons for what it works around stand beside each step.
New weights come through vLLM's weight-transfer interface (`vllm_transfer`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from morlaif_ray.backbone import load_causal_lm, load_tokenizer
from morlaif_ray.rl.adapter_transfer import BaseWeights
from morlaif_ray.rl.generation import SamplingSettings, assemble_batch, encode_requests
from morlaif_ray.rl.lora_merging import Adapter
from morlaif_ray.rl.weight_broadcast import Announcement, Rendezvous
from morlaif_ray.rl.weight_files import shared_files
from morlaif_ray.types import GenerationRequest, RolloutBatch
from morlaif_ray.vllm_environment import CPU_CACHE_MB, prepare_vllm_environment, require_vllm


@dataclass(frozen=True)
class VllmSettings:
    """How much memory and how many sequences the engine may take (`policy.vllm` of the config)."""

    max_num_seqs: int = 64
    kv_cache_mb: int | None = None
    """None: `CPU_CACHE_MB` on a CPU, what `gpu_memory_utilization` leaves on a GPU."""
    gpu_memory_utilization: float = 0.85
    enforce_eager: bool = True
    """True: starts in seconds; False: compiles and captures graphs."""
    tensor_parallel_size: int = 1
    """Child processes that each hold a slice of every layer (Shoeybi et al. 2019), one GPU each; 1: no child."""
    weight_transfer: str = "host"
    """What new weights come by beside arrays of this host: `gloo`, `nccl` or `ipc` (`vllm_transfer`)."""


class VllmEngine:
    """A `GenerationEngine`. Threads may call `generate` at the same time: their requests run in one batch."""

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "float32",
        settings: VllmSettings | None = None,
        max_model_len: int | None = None,
    ) -> None:
        settings = settings or VllmSettings()
        self.tokenizer = load_tokenizer(str(model_path))
        self.policy_version = 0
        self._folder, self._dtype = str(model_path), dtype
        self._num_slices, self._backend = settings.tensor_parallel_size, settings.weight_transfer
        self._base: BaseWeights | None = None
        self._parameters, positions = _parameters_of(str(model_path))
        self.max_model_len = min(max_model_len or positions, positions)
        self._llm = _start(str(model_path), dtype, settings, self.max_model_len)
        self._engine = self._llm.llm_engine
        self._numbers = itertools.count()
        self._condition = threading.Condition()
        self._stepping = False
        self._finished: dict[str, tuple[list[int], list[float]]] = {}
        self._failure: BaseException | None = None

    def generate(
        self, requests: Sequence[GenerationRequest], settings: SamplingSettings
    ) -> RolloutBatch:
        """Samples one response per request; order kept."""
        prompts = encode_requests(self.tokenizer, requests, settings, self.max_model_len)
        with self._condition:
            version = self.policy_version
            names = [
                self._add(ids, request.seed, settings)
                for ids, request in zip(prompts, requests, strict=True)
            ]
        results = self._await(names)
        tokens, logprobs = [list(column) for column in zip(*results, strict=True)]
        return assemble_batch(
            self.tokenizer, requests, prompts, tokens, logprobs, settings, version
        )

    def load_weights(self, weights: Mapping[str, np.ndarray[Any, Any]], version: int) -> None:
        """Adopts all weights and their version; call it while nothing is being generated."""
        self._check_names(weights)
        # A writable copy of each array as it is consumed: torch must not alias read-only shared memory.
        tensors = ((name, torch.from_numpy(np.array(array))) for name, array in weights.items())
        size = sum(array.nbytes for array in weights.values())
        self._reload_from(tensors, size, list(weights), version)

    def load_adapters(
        self, adapters: Mapping[str, Sequence[Adapter]], base: int, version: int
    ) -> None:
        """Adopts the folder's weights, checksum `base`, with these adapters merged into them; rules of `load_weights`.

        ArtifactError where the folder holds other weights than the learner's.
        """
        if self._base is None:
            # vLLM's own copies are fused and packed: the base is read once more, and stays on the host.
            model = load_causal_lm(self._folder, dtype=self._dtype)
            self._base = BaseWeights(model.named_parameters())
        self._base.check(base, adapters)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # All of them, also those without adapters: vLLM fuses layers (see above).
        tensors = self._base.merged(adapters, device)
        self._reload_from(tensors, self._base.num_bytes, list(self._base.names), version)

    def load_model(self, path: str) -> None:
        """The weights and tokenizer of another folder with a model of the same shape; the version is 0 again."""
        self.tokenizer = load_tokenizer(path)
        self._folder, self._base = path, None

        def reload() -> None:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

        self._refresh(reload, [], 0)

    def join_transfer(self, where: Rendezvous) -> None:
        """Joins the learner's group with all slices, in the place of an earlier one; RuntimeError where it cannot."""
        from morlaif_ray.rl.vllm_transfer import init_info

        with self._condition:
            self._llm.shutdown_weight_transfer_engine()
            self._llm.init_weight_transfer_engine({"init_info": init_info(where)})
            self._raise_transfer_failure()

    def receive_weights(self, announcement: Announcement) -> None:
        """Adopts the weights that the learner sends meanwhile, once they are verified; rules of `load_weights`.

        RuntimeError: the weights are unfit, the version is the old one, and `load_weights` has to follow.
        """
        from morlaif_ray.rl.vllm_transfer import update_info

        self._check_names(announcement.weight_names)
        told = update_info(self._backend, announcement)
        self._update(told, announcement.weight_names, announcement.version)

    def gpu_uuid(self) -> str:
        """Of the first slice's GPU; '' without one."""
        return str(self._llm.collective_rpc("gpu_uuid")[0])

    def when_lost(self, act: Callable[[], None]) -> None:
        """Calls `act`, from a thread, as soon as a child process has died; the engine is of no more use then."""
        if self._num_slices > 1:
            core = self._engine.engine_core.engine_core
            core.model_executor.register_failure_callback(act)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _check_names(self, given: Iterable[str]) -> None:
        names = set(given)
        missing, unknown = sorted(self._parameters - names), sorted(names - self._parameters)
        if unknown:
            raise KeyError(f"weight '{unknown[0]}' is not a parameter of the rollout model")
        if missing:
            # vLLM fuses layers: one that arrives in part becomes NaN.
            raise KeyError(f"weight '{missing[0]}' is missing; vLLM takes all weights or none")

    def _reload_from(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        num_bytes: int,
        sent: list[str],
        version: int,
    ) -> None:
        if self._num_slices == 1:
            self._update({"weights": tensors}, sent, version)
            return
        with shared_files(tensors, num_bytes) as paths:
            self._update({"paths": paths}, sent, version)

    def _update(self, told: dict[str, Any], sent: Sequence[str], version: int) -> None:
        """vLLM's own life cycle of an update, with one message."""

        def update() -> None:
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": told})
            # Also where weights are missing: the next update would count those that came as its own.
            self._llm.finish_weight_update()
            self._raise_transfer_failure()
            self._llm.update_weight_version(str(version))

        self._refresh(update, sent, version)

    def _raise_transfer_failure(self) -> None:
        failures = [each for each in self._llm.collective_rpc("take_transfer_failure") if each]
        if failures:
            raise RuntimeError(failures[0])

    def _refresh(self, load: Callable[[], None], sent: Sequence[str], version: int) -> None:
        with self._condition:
            assert not self._engine.has_unfinished_requests(), "weights change between generations"
            load()
            if not torch.cuda.is_available():
                self._llm.collective_rpc("repack_heads", args=(sent,))
            # Without this, prompts seen before would go on from keys and values of the old weights.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not drop its prefix cache after a weight refresh")
            self.policy_version = version

    def _add(self, prompt: list[int], seed: int, settings: SamplingSettings) -> str:
        from vllm import SamplingParams

        name = str(next(self._numbers))
        parameters = SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            stop=list(settings.stop_marks),
            stop_token_ids=[self.tokenizer.eos_token_id],
            detokenize=bool(settings.stop),
            skip_special_tokens=True,
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        return name

    def _await(self, names: Sequence[str]) -> list[tuple[list[int], list[float]]]:
        """Results of the named requests. Whichever caller is free steps the engine for all."""
        with self._condition:
            while True:
                if all(name in self._finished for name in names):
                    return [self._finished.pop(name) for name in names]
                if self._failure is not None:
                    raise RuntimeError("vLLM's engine failed") from self._failure
                if self._stepping:
                    self._condition.wait()
                    continue
                self._stepping = True
                # Released while it computes, so that other callers can add requests between steps.
                self._condition.release()
                try:
                    outputs: Iterable[Any] = self._engine.step()
                except BaseException as error:
                    self._condition.acquire()
                    self._failure, self._stepping = error, False
                    self._condition.notify_all()
                    raise
                self._condition.acquire()
                self._stepping = False
                for output in outputs:
                    if output.finished:
                        self._finished[output.request_id] = _sampled(output.outputs[0])
                self._condition.notify_all()


def _start(model_path: str, dtype: str, settings: VllmSettings, max_model_len: int) -> Any:
    require_vllm("policy.engine")
    prepare_vllm_environment()
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    from morlaif_ray.rl.vllm_transfer import backend_name

    cache_mb = settings.kv_cache_mb
    if cache_mb is None and not torch.cuda.is_available():
        cache_mb = CPU_CACHE_MB
    sliced: dict[str, Any] = {}
    if settings.tensor_parallel_size > 1:
        # Children of this process: inside an actor vLLM would else ask Ray for GPUs that the actor has already.
        sliced = {
            "tensor_parallel_size": settings.tensor_parallel_size,
            "distributed_executor_backend": "mp",
        }
    memory: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
    if cache_mb is not None:
        memory = {"kv_cache_memory_bytes": cache_mb << 20}
    return LLM(
        model=model_path,
        tokenizer=model_path,
        dtype=dtype,
        seed=0,
        enforce_eager=settings.enforce_eager,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        generation_config="vllm",  # sampling is ours to say, not the model folder's
        logprobs_mode="processed_logprobs",  # of the distribution that was sampled from, temperature included
        worker_extension_cls="morlaif_ray.rl.vllm_transfer.TransferExtension",
        weight_transfer_config=WeightTransferConfig(backend=backend_name(settings.weight_transfer)),
        disable_log_stats=True,
        trust_remote_code=False,
        **memory,
        **sliced,
    )


def _parameters_of(model_path: str) -> tuple[frozenset[str], int]:
    """(parameter names as transformers has them, positions); tied weights once. No weight is loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    positions = getattr(config, "max_position_embeddings", None) or 1 << 20
    return frozenset(name for name, _ in model.named_parameters()), int(positions)


def _sampled(output: Any) -> tuple[list[int], list[float]]:
    """(tokens, log-probabilities) of a finished response."""
    tokens = [int(token) for token in output.token_ids]
    return tokens, [
        float(entry[token].logprob) for token, entry in zip(tokens, output.logprobs, strict=True)
    ]
