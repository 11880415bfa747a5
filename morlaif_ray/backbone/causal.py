"""Causal language models: a small GPT-2 from scratch, or any `AutoModelForCausalLM` (safetensors, no remote code)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.errors import ArtifactError


def build_scratch_model(config: ScratchModel, tokenizer: Any, seed: int) -> Any:
    """A GPT-2 of the configured size with random weights that depend on the seed alone. No dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=config.max_length,
        n_embd=config.width,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # GPT-2's own activation, but as one fused operation: a quarter off a CPU forward.
        activation_function="gelu_pytorch_tanh",
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % (1 << 62))
        return GPT2LMHeadModel(settings)


def load_causal_lm(path: str, *, dtype: str = "float32", revision: str | None = None) -> Any:
    """Loads a causal LM; ArtifactError names the path when there is none."""
    from transformers import AutoModelForCausalLM

    return load_whole(
        AutoModelForCausalLM,
        path,
        "causal language model",
        dtype=getattr(torch, dtype),
        revision=revision,
    )


ALIGNMENT = 64
"""Bytes: a cache line, and torch's own allocator's."""


def load_whole(
    loader: Any,
    path: str,
    what: str,
    *,
    fresh: str | tuple[str, ...] | None = None,
    on_fresh: Callable[[Any, Sequence[str]], None] = lambda model, names: None,
    **options: Any,
) -> Any:
    """`loader.from_pretrained` without pickle or remote code; ArtifactError where it fails or a weight is absent.

    transformers fills absent weights with random numbers; here only names that begin with `fresh` may be. `on_fresh`
    is given the model and these names.
    """
    try:
        model, info = loader.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: no {what} could be loaded ({str(error).splitlines()[0]}); "
            f"give a folder saved by save_pretrained or a reachable model id"
        ) from None
    absent = sorted(
        key for key in info["missing_keys"] if fresh is None or not key.startswith(fresh)
    )
    if absent:
        raise ArtifactError(
            f"{path}: weight '{absent[0]}' of the {what} is missing; make the model again"
        )
    on_fresh(model, info["missing_keys"])
    _align(model)
    return model


def _align(model: Any) -> None:
    """Moves weights that lie in a mapped file to where torch puts its own: at multiples of 64 bytes.

    In the file they begin anywhere. Vector instructions then cross cache lines, and some round sums in another order:
    a loaded model would differ from the saved one in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes model (safetensors) and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
