"""Sampling responses. `GenerationEngine` is the protocol; `TransformersEngine` runs anywhere (vLLM: `vllm_engine`).

Every request carries its own seed and draws one uniform number per token (inverse-CDF sampling), so a response does not
depend on the batch it was generated in, on the worker, or on how often a lost batch was repeated.
Legend: B requests, P prompt tokens, T response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from morlaif_ray.backbone import encode_prompt, load_causal_lm, load_tokenizer, with_leading_space
from morlaif_ray.cpu_products import fast_products
from morlaif_ray.errors import ConfigError
from morlaif_ray.rl.adapter_transfer import BaseWeights
from morlaif_ray.rl.lora_merging import Adapter
from morlaif_ray.rl.weight_broadcast import (
    Announcement,
    CheckedLoader,
    GlooGroup,
    Rendezvous,
    receive_by_gloo,
)
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import GenerationRequest, RolloutBatch


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    stop: tuple[str, ...] = ()
    max_prompt_tokens: int = 1_000_000
    """Longer prompts keep their end."""

    @property
    def stop_marks(self) -> tuple[str, ...]:
        """The stop strings as they are looked for: without the white space that word-level decoders drop."""
        return tuple(stop.strip() or stop for stop in self.stop)


class GenerationEngine(Protocol):
    """What the rollout actor needs of an engine."""

    policy_version: int

    def generate(
        self, requests: Sequence[GenerationRequest], settings: SamplingSettings
    ) -> RolloutBatch: ...

    def load_weights(self, weights: Mapping[str, np.ndarray[Any, Any]], version: int) -> None: ...

    def load_adapters(
        self, adapters: Mapping[str, Sequence[Adapter]], base: int, version: int
    ) -> None: ...

    def load_model(self, path: str) -> None: ...

    def join_transfer(self, where: Rendezvous) -> None: ...

    def receive_weights(self, announcement: Announcement) -> None: ...

    def gpu_uuid(self) -> str: ...


class TransformersEngine:
    """Batched sampling with a key-value cache; finished rows leave the batch."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.policy_version = 0
        self._base: BaseWeights | None = None
        self._incoming: tuple[GlooGroup, int] | None = None
        """The learner's group and the size of its buckets."""

    @classmethod
    def from_path(cls, path: str | Path, *, dtype: str = "float32") -> TransformersEngine:
        return cls(load_causal_lm(str(path), dtype=dtype), load_tokenizer(str(path)))

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, np.ndarray[Any, Any]], version: int) -> None:
        """Copies named weights in place (a view of shared memory is never kept) and adopts their version."""
        parameters = self._known(weights)
        for name, array in weights.items():
            # A writable copy first: torch must not alias Ray's read-only shared memory.
            parameters[name].copy_(torch.from_numpy(np.array(array)))
        self.policy_version = version

    def join_transfer(self, where: Rendezvous) -> None:
        """Joins the learner's group, in the place of an earlier one; raises after its time-out."""
        assert where.backend == "gloo", "the config allows no other"
        if self._incoming is not None:
            self._incoming[0].close()
        self._incoming = None
        self._incoming = GlooGroup(where, where.first_rank), where.max_bytes

    @torch.no_grad()
    def receive_weights(self, announcement: Announcement) -> None:
        """Adopts the weights that the learner sends meanwhile, once they are verified.

        Where it raises, the weights are unfit, the version is the old one, and `load_weights` has to follow.
        """
        assert self._incoming is not None, "join_transfer comes first"
        parameters = self._known(announcement.weight_names)

        def load(weights: Sequence[tuple[str, Tensor]]) -> None:
            for name, weight in weights:
                parameters[name].copy_(weight)

        loader = CheckedLoader(load)
        group, max_bytes = self._incoming
        receive_by_gloo(group, announcement, max_bytes, loader)
        loader.verify(announcement.version)
        self.policy_version = announcement.version

    def gpu_uuid(self) -> str:
        """'': it takes no part in transfers between GPUs."""
        return ""

    def _known(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The model's parameters; KeyError where a name is none of theirs."""
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        unknown = sorted(set(names) - set(parameters))
        if unknown:
            raise KeyError(f"weight '{unknown[0]}' is not a parameter of the rollout model")
        return parameters

    @torch.no_grad()
    def load_adapters(
        self, adapters: Mapping[str, Sequence[Adapter]], base: int, version: int
    ) -> None:
        """Adopts the weights that this engine started with, checksum `base`, with these adapters merged into them.

        ArtifactError where it started with other weights than the learner.
        """
        parameters = dict(self.model.named_parameters())
        if self._base is None:
            self._base = BaseWeights(parameters.items(), wanted=adapters)
        self._base.check(base, adapters)
        for name, weight in self._base.merged(adapters, next(self.model.parameters()).device):
            parameters[name].copy_(weight)
        self.policy_version = version

    def load_model(self, path: str) -> None:
        """Replaces model and tokenizer by those of another folder; the version is 0 again."""
        old = next(self.model.parameters())
        dtype = str(old.dtype).removeprefix("torch.")
        self.model = load_causal_lm(path, dtype=dtype).to(old.device).eval()
        self.tokenizer = load_tokenizer(path)
        self.policy_version = 0
        self._base = None

    @torch.no_grad()
    @fast_products()
    def generate(
        self, requests: Sequence[GenerationRequest], settings: SamplingSettings
    ) -> RolloutBatch:
        """Samples one response per request; order kept."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        prompts = encode_requests(self.tokenizer, requests, settings, limit)
        uniforms = np.stack(
            [
                np.random.default_rng(derive_seed("sample", request.seed)).random(
                    settings.max_new_tokens
                )
                for request in requests
            ]
        )
        tokens, logprobs = self._sample(prompts, torch.from_numpy(uniforms), settings)
        return assemble_batch(
            self.tokenizer, requests, prompts, tokens, logprobs, settings, self.policy_version
        )

    def _sample(
        self, prompts: list[list[int]], uniforms_BT: Tensor, settings: SamplingSettings
    ) -> tuple[list[list[int]], list[list[float]]]:
        device = next(self.model.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        # Left padding: all rows then share their next position in the cache.
        input_ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        uniforms_BT = uniforms_BT.to(device)
        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        alive = torch.arange(len(prompts), device=device)
        cache: Any = None
        for t in range(settings.max_new_tokens):
            output = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            chosen, chosen_logprobs = _choose(
                output.logits[:, -1].float(), uniforms_BT[alive, t], settings.temperature
            )
            rows = alive.tolist()
            for row, token, logprob in zip(
                rows, chosen.tolist(), chosen_logprobs.tolist(), strict=True
            ):
                if not ended[row]:
                    tokens[row].append(token)
                    logprobs[row].append(logprob)
                    ended[row] = self._is_end(tokens[row], settings)
            keep = [place for place, row in enumerate(rows) if not ended[row]]
            if not keep:
                break
            input_ids, positions = chosen.unsqueeze(1), positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(chosen).unsqueeze(1)], dim=1)
            # Compaction copies the cache: worth it for many rows at once.
            if len(keep) <= len(rows) * 3 // 4:
                index = torch.tensor(keep, device=device)
                cache.batch_select_indices(index)
                alive, input_ids, positions, mask = (
                    alive[index],
                    input_ids[index],
                    positions[index],
                    mask[index],
                )
        return tokens, logprobs

    def _is_end(self, row: list[int], settings: SamplingSettings) -> bool:
        """True once the last token is EOS or completes a stop string."""
        if row[-1] == self.tokenizer.eos_token_id:
            return True
        if not settings.stop:
            return False
        text = self.tokenizer.decode(row[-16:], skip_special_tokens=True)
        return any(mark in text for mark in settings.stop_marks)


def encode_requests(
    tokenizer: Any, requests: Sequence[GenerationRequest], settings: SamplingSettings, limit: int
) -> list[list[int]]:
    """Prompt tokens of each request, cut from the left so that prompt and response fit `limit` positions."""
    prompt_limit = min(settings.max_prompt_tokens, limit - settings.max_new_tokens)
    if prompt_limit < 1:
        raise ConfigError(
            f"{settings.max_new_tokens} new tokens leave no room for a prompt within the model's "
            f"{limit} positions; lower max_new_tokens"
        )
    return [encode_prompt(tokenizer, request.prompt, prompt_limit) for request in requests]


def assemble_batch(
    tokenizer: Any,
    requests: Sequence[GenerationRequest],
    prompts: list[list[int]],
    tokens: list[list[int]],
    logprobs: list[list[float]],
    settings: SamplingSettings,
    policy_version: int,
) -> RolloutBatch:
    """What an engine sampled as one batch; text ends before EOS or a stop string, tokens hold both."""
    num = len(requests)
    prompt_lengths = np.array([len(row) for row in prompts], dtype=np.int64)
    lengths = np.array([len(row) for row in tokens], dtype=np.int64)
    sequence = np.full(
        (num, int((prompt_lengths + lengths).max())), tokenizer.pad_token_id, np.int64
    )
    logprobs_BT = np.zeros((num, int(lengths.max())), dtype=np.float32)
    responses, truncated = [], np.zeros(num, dtype=np.bool_)
    for row in range(num):
        ids = prompts[row] + tokens[row]
        sequence[row, : len(ids)] = ids
        logprobs_BT[row, : len(tokens[row])] = logprobs[row]
        text = tokenizer.decode(tokens[row], skip_special_tokens=True)
        stopped = [text.index(mark) for mark in settings.stop_marks if mark in text]
        if stopped:
            text = text[: min(stopped)].rstrip()
        truncated[row] = not stopped and tokens[row][-1] != tokenizer.eos_token_id
        responses.append(with_leading_space(text))
    return RolloutBatch(
        prompts=tuple(request.prompt for request in requests),
        responses=tuple(responses),
        tokens_BL=sequence,
        prompt_lengths_B=prompt_lengths,
        response_lengths_B=lengths,
        logprobs_BT=logprobs_BT,
        truncated_B=truncated,
        policy_version=policy_version,
    )


def _choose(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the row's uniform number."""
    if temperature == 0.0:
        chosen = logits_BV.argmax(dim=-1)
        logprobs = torch.log_softmax(logits_BV, dim=-1)
    else:
        logprobs = torch.log_softmax(logits_BV / temperature, dim=-1)
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        threshold = uniform_B.double().unsqueeze(1) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
        chosen = chosen.clamp(max=logits_BV.shape[1] - 1)
    return chosen, logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1)
