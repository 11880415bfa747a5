"""Scores of a saved preference model from vLLM's pooling runner, inside the calling process.

    model = PooledPreferenceModel("models/trunk", PoolingSettings(max_num_seqs=64))
    model.raw_scores(texts)     # within rounding what PreferenceModel.load("models/trunk").raw_scores(texts) gives

Whole decoders with one head or several: the folder's own tokenizer, truncation and EOS give the tokens, vLLM only the
raw logits of the last one. The engine has no child processes, re-seeds torch's global generator and changes torch's
settings for good: it wants a process without other models.
Legend: B texts, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from morlaif_ray.backbone import encode_scored_texts, load_tokenizer
from morlaif_ray.errors import ConfigError
from morlaif_ray.preference.saved import Card, check_stored_heads, read_card, require_finite
from morlaif_ray.types import FloatArray
from morlaif_ray.vllm_environment import (
    CPU_HEAD_SIZES,
    head_width,
    kv_bytes_per_token,
    pooling_cache_bytes,
    prepare_vllm_environment,
    require_vllm,
)

KEY = "preference.engine"
FREE_SHARE = 0.9
"""Of the engine's share of a GPU: what vLLM wants to find free when it starts."""


@dataclass(frozen=True)
class PoolingSettings:
    """How many texts the engine takes at once, and the memory for them (`preference.vllm` of the config)."""

    max_num_seqs: int = 64
    """Most texts of one pass (`preference.score_batch_size`)."""
    max_tokens: int | None = None
    """Most tokens of one pass, but at least a text of full length (`preference.score_tokens_per_batch`); None: vLLM's
    own number."""
    kv_cache_mb: int | None = None
    """None: `pooling_cache_bytes`."""
    enforce_eager: bool = True
    """True: starts in seconds; False: compiles first."""
    gpu_share: float = 0.0
    """Part of a GPU that this engine may take; 0: a CPU."""


class PooledPreferenceModel:
    """Scores dialogues as `PreferenceModel` does."""

    def __init__(self, folder: str | Path, settings: PoolingSettings | None = None) -> None:
        """Starts the engine; before that ConfigError for a folder that it cannot score, and where vLLM is absent."""
        folder, settings = Path(folder), settings or PoolingSettings()
        card = read_card(folder)
        _check_whole_decoder(folder, card)
        require_vllm(KEY)
        check_stored_heads(folder, card)
        self.heads = tuple(card.heads)
        self.max_length = card.max_length
        self.tokenizer = load_tokenizer(str(folder))
        self._llm = _start(folder, card, settings)
        self._failure: str | None = None
        from vllm import PoolingParams

        self._raw = PoolingParams(use_activation=False)  # the default is a sigmoid or a softmax

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_scored_texts(self.tokenizer, texts, self.max_length)

    def raw_scores(self, texts: Sequence[str], heads: Sequence[int] | None = None) -> FloatArray:
        """Scores [B, H] of the wanted heads (default all); one may be non-finite: the caller says what that means."""
        wanted = list(range(len(self.heads)) if heads is None else heads)
        if not texts:
            return np.empty((0, len(wanted)), dtype=np.float64)
        if self._failure is not None:
            raise RuntimeError(f"vLLM failed before: {self._failure}")
        prompts = [{"prompt_token_ids": ids} for ids in self.encode(texts)]
        try:
            outputs = self._llm.classify(prompts, pooling_params=self._raw, use_tqdm=False)
        except Exception as error:
            # What was queued stays in the engine, which would answer the next call with it.
            self._failure = _in_short(error)
            raise
        if len(outputs) != len(texts):
            raise RuntimeError(f"vLLM gave {len(outputs)} scores for {len(texts)} texts")
        scores_BH = np.array([output.outputs.probs for output in outputs], dtype=np.float64)
        return scores_BH[:, wanted]

    def score_heads(self, texts: Sequence[str]) -> FloatArray:
        """Raw scores [B, H] in head order; NumericalError names head and text of one that is not finite."""
        return require_finite(self.raw_scores(texts), self.heads)

    def close(self) -> None:
        """`LLM` has no end of its own."""
        self._llm.llm_engine.engine_core.shutdown()


def _check_whole_decoder(folder: Path, card: Card) -> None:
    kinds = {
        "an adapter": card.adapter,
        "a model with branches": card.branch_blocks is not None,
        "an encoder": card.encoder_head is not None,
    }
    for kind, is_so in kinds.items():
        if is_so:
            raise ConfigError(
                f"{folder}: {KEY} is 'vllm', which scores whole decoders, and this is {kind}; write {KEY}: transformers"
            )


def _start(folder: Path, card: Card, settings: PoolingSettings) -> Any:
    from transformers import AutoConfig

    on_gpu = settings.gpu_share > 0
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    if not on_gpu and head_width(config) not in CPU_HEAD_SIZES:
        known = ", ".join(str(size) for size in CPU_HEAD_SIZES[:4])
        raise ConfigError(
            f"{folder}: {KEY} is 'vllm', which on CPU has no attention for heads of {head_width(config)}; choose a "
            f"head size of {known} ..., or write {KEY}: transformers"
        )
    per_token = kv_bytes_per_token(config, 4 if card.dtype == "float32" else 2)
    cache = pooling_cache_bytes(settings.kv_cache_mb, card.max_length, per_token, on_gpu=on_gpu)
    limits: dict[str, Any] = {}
    if settings.max_tokens is not None:
        # A text must fit, and vLLM wants room for a token of each text.
        limits["max_num_batched_tokens"] = max(
            settings.max_tokens, card.max_length, settings.max_num_seqs
        )
    if on_gpu:
        limits["gpu_memory_utilization"] = FREE_SHARE * min(1.0, settings.gpu_share)
    prepare_vllm_environment()
    from vllm import LLM

    try:
        return LLM(
            model=str(folder),
            runner="pooling",
            convert="classify",
            dtype=card.dtype,
            seed=0,
            load_format="safetensors",  # never a pickle
            max_model_len=card.max_length,
            max_num_seqs=settings.max_num_seqs,
            enforce_eager=settings.enforce_eager,
            kv_cache_memory_bytes=cache,
            # A text's score must not depend on which texts were scored before it.
            enable_prefix_caching=False,
            # Nor on where a pass ends: no text is computed in pieces.
            enable_chunked_prefill=False,
            disable_log_stats=True,
            trust_remote_code=False,
            **limits,
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"{folder}: vLLM cannot score this preference model ({_in_short(error)}); write {KEY}: transformers"
        ) from error


def _in_short(error: BaseException) -> str:
    """The first line of a message that says something: pydantic's own is a count of errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if "validation error" not in line] or lines
    return lines[0][:200] if lines else type(error).__name__
