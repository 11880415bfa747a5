"""The next token's log-probabilities of prompts that share a prefix: one prefill per group, no sampling.

    groups of token ids -> longest common prefix -> KV cache, once per group -> suffixes behind it -> logits

The suffixes stand behind their prefix in one of two ways. Packed, where attention takes a mask of our own: all suffixes
of a group in one row, each blind to the others, and the cache is never copied. Expanded (sliding windows, unknown
families): one row per suffix, each with a copy of its group's cache. Models whose cache is not made of keys and values
(Mamba and its kin) are asked with whole prompts.

Contract: the answer for a prompt is that of the prompt alone, up to rounding (float32: below 1e-4 nats), whatever it is
grouped or batched with.

Legend: G groups, R rows (one per prompt), P prefix tokens, S suffix tokens, T packed suffix tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from morlaif_ray.cpu_products import fast_products

Ids = list[int]
Read = TypeVar("Read")
Logits = tuple[list[int], torch.Tensor]
"""(prompt numbers, their logits_RV)."""

PACKED_FAMILIES = frozenset(
    ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
)
"""`model_type`s that are tested to follow a four-dimensional attention mask; the others are expanded."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One group of prompts cut after their common prefix; every suffix keeps at least one token."""

    numbers: tuple[int, ...]
    """Where the prompts stand in the caller's order."""
    prefix: Ids
    suffixes: tuple[Ids, ...]

    def part(self, start: int, stop: int) -> Cut:
        return Cut(self.numbers[start:stop], self.prefix, self.suffixes[start:stop])


def common_prefix_length(prompts: Sequence[Ids]) -> int:
    """Tokens that all prompts begin with, short of the whole of any of them: its last token must be asked."""
    low, high = min(prompts), max(prompts)  # lexicographic: what the extremes share, all share
    limit = min(map(len, prompts)) - 1
    return next((place for place in range(limit) if low[place] != high[place]), limit)


def cut_groups(groups: Sequence[Sequence[Ids]]) -> list[Cut]:
    """The groups in the caller's order; prompts are numbered through all of them."""
    cuts, first = [], 0
    for prompts in groups:
        length = common_prefix_length(prompts)
        numbers = tuple(range(first, first + len(prompts)))
        cuts.append(Cut(numbers, prompts[0][:length], tuple(ids[length:] for ids in prompts)))
        first += len(prompts)
    return cuts


class PrefixScorer:
    """Scores prompts with a causal LM that is in eval mode and on its device.

    Args:
        max_rows: most prompts in one forward pass; bounds its memory.
        may_pack: False expands the cache for every family.
    """

    def __init__(self, model: Any, *, pad_id: int, max_rows: int, may_pack: bool = True) -> None:
        self._model = model
        self._pad_id = pad_id
        self._max_rows = max_rows
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._shares = {"past_key_values", "logits_to_keep"} <= accepted.keys()
        self._packs = (
            may_pack
            and model.config.model_type in PACKED_FAMILIES
            and model.config._attn_implementation in ("sdpa", "eager")
        )

    @torch.inference_mode()
    @fast_products()
    def score(
        self, groups: Sequence[Sequence[Ids]], read: Callable[[torch.Tensor], list[Read]]
    ) -> list[Read]:
        """What `read` makes of logprobs_RV (float32, nats, the whole vocabulary) of every prompt, in order."""
        found: dict[int, Read] = {}
        for cuts in self._batched(cut_groups(groups)):
            for numbers, logits_RV in self._forward(cuts):
                logprobs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
                found |= zip(numbers, read(logprobs_RV), strict=True)
        return [found[number] for number in range(len(found))]

    def _batched(self, cuts: Sequence[Cut]) -> Iterator[list[Cut]]:
        """Groups of like length together, so that little is padding, as many as `max_rows` holds."""
        batch: list[Cut] = []
        for cut in sorted(cuts, key=lambda cut: len(cut.prefix)):
            if batch and sum(len(entry.numbers) for entry in (*batch, cut)) > self._max_rows:
                yield batch
                batch = []
            batch.append(cut)
        if batch:
            yield batch

    def _forward(self, cuts: list[Cut]) -> Iterator[Logits]:
        num_rows = sum(len(cut.numbers) for cut in cuts)
        # One prompt per group shares nothing: a second pass would only cost.
        wanted = self._shares and num_rows > len(cuts) and all(cut.prefix for cut in cuts)
        prefix = self._prefill(cuts) if wanted else None
        parts = [cuts]
        if num_rows > self._max_rows:  # then it is one large group
            starts = range(0, num_rows, self._max_rows)
            parts = [[cuts[0].part(start, start + self._max_rows)] for start in starts]
        for number, part in enumerate(parts):
            if prefix is None:
                yield self._whole(part)
                continue
            # A forward pass appends to its cache: all but the last get a copy.
            last = number == len(parts) - 1
            own = prefix if last else _Prefix(copy.deepcopy(prefix.cache), prefix.mask_GP)
            yield self._packed(part, own) if self._packs else self._expanded(part, own)

    def _prefill(self, cuts: list[Cut]) -> _Prefix | None:
        """The KV cache of the groups' prefixes, padded on the left; None where the model keeps another kind."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        length = max(len(cut.prefix) for cut in cuts)
        gaps = [length - len(cut.prefix) for cut in cuts]
        tokens_GP = self._tensor(
            [[self._pad_id] * gap + list(cut.prefix) for cut, gap in zip(cuts, gaps, strict=True)]
        )
        positions_GP = self._places(length) - self._tensor(gaps)[:, None]
        mask_GP = (positions_GP >= 0).long()
        output = self._call(
            tokens_GP, mask_GP, positions_GP.clamp(min=0), use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        kinds = (
            {type(layer) for layer in cache.layers} if isinstance(cache, DynamicCache) else {None}
        )
        self._shares = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        self._packs = self._packs and kinds == {DynamicLayer}
        return _Prefix(cache, mask_GP) if self._shares else None

    def _packed(self, cuts: list[Cut], prefix: _Prefix) -> Logits:
        """One row per group: its suffixes one after the other, each seeing the prefix and itself alone."""
        lengths = [[len(suffix) for suffix in cut.suffixes] for cut in cuts]
        total = max(map(sum, lengths))
        rows = [[token for suffix in cut.suffixes for token in suffix] for cut in cuts]
        owners = [[n for n, size in enumerate(sizes) for _ in range(size)] for sizes in lengths]
        places = [[place for size in sizes for place in range(size)] for sizes in lengths]
        tokens_GT = self._padded(rows, self._pad_id, total)
        owners_GT = self._padded(owners, -1, total)  # padding sees padding: no row is without a key
        places_GT = self._padded(places, 0, total)
        own_GTT = (owners_GT[:, :, None] == owners_GT[:, None, :]).tril()
        before_GTP = prefix.mask_GP.bool()[:, None, :].expand(-1, total, -1)
        seen_GTL = torch.cat([before_GTP, own_GTT], dim=2)
        dtype = self._model.dtype
        mask = torch.zeros(seen_GTL.shape, dtype=dtype, device=seen_GTL.device)
        mask.masked_fill_(~seen_GTL, torch.finfo(dtype).min)
        positions_GT = places_GT + prefix.mask_GP.sum(dim=1, keepdim=True)
        ends = [list(itertools.accumulate(sizes)) for sizes in lengths]
        kept_U, where_R = torch.unique(
            self._tensor([end - 1 for row in ends for end in row]), return_inverse=True
        )
        logits = self._call(
            tokens_GT,
            mask[:, None],
            positions_GT,
            past_key_values=prefix.cache,
            use_cache=True,
            logits_to_keep=kept_U,
        ).logits
        groups_R = self._tensor([group for group, row in enumerate(ends) for _ in row])
        return [number for cut in cuts for number in cut.numbers], logits[groups_R, where_R]

    def _expanded(self, cuts: list[Cut], prefix: _Prefix) -> Logits:
        """One row per prompt, each with its own copy of its group's cache."""
        groups_R = self._tensor([group for group, cut in enumerate(cuts) for _ in cut.numbers])
        prefix.cache.batch_select_indices(groups_R)
        texts = [suffix for cut in cuts for suffix in cut.suffixes]
        logits_RV = self._last_logits(texts, _Prefix(prefix.cache, prefix.mask_GP[groups_R]))
        return [number for cut in cuts for number in cut.numbers], logits_RV

    def _whole(self, cuts: list[Cut]) -> Logits:
        texts = [[*cut.prefix, *suffix] for cut in cuts for suffix in cut.suffixes]
        return [number for cut in cuts for number in cut.numbers], self._last_logits(texts, None)

    def _last_logits(self, texts: Sequence[Ids], prefix: _Prefix | None) -> torch.Tensor:
        """logits_RV after the last token of each text, padded on the right, behind its row of `prefix`."""
        lengths_R = self._tensor([len(text) for text in texts])
        length = int(lengths_R.max())
        tokens_RS = self._padded(texts, self._pad_id, length)
        mask_RS = (self._places(length) < lengths_R[:, None]).long()
        positions_RS = self._places(length).expand_as(tokens_RS)
        options: dict[str, Any] = {"use_cache": False}
        if prefix is not None:
            positions_RS = positions_RS + prefix.mask_GP.sum(dim=1, keepdim=True)
            mask_RS = torch.cat([prefix.mask_GP, mask_RS], dim=1)
            options = {"use_cache": True, "past_key_values": prefix.cache}
        ends_R = lengths_R - 1
        if self._shares:
            # The vocabulary is most of a small model: meet it only where a text ends.
            kept_U, ends_R = torch.unique(ends_R, return_inverse=True)
            options["logits_to_keep"] = kept_U
        logits: torch.Tensor = self._call(tokens_RS, mask_RS, positions_RS, **options).logits
        return logits[self._places(len(texts)), ends_R]

    def _call(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, **options: Any
    ) -> Any:
        if self._takes_positions:
            options["position_ids"] = positions
        return self._model(input_ids=tokens, attention_mask=mask, **options)

    def _padded(self, rows: Sequence[Ids], filler: int, length: int) -> torch.Tensor:
        return self._tensor([[*row, *[filler] * (length - len(row))] for row in rows])

    def _places(self, length: int) -> torch.Tensor:
        return torch.arange(length, device=self._model.device)

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, device=self._model.device)


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The KV cache of G prefixes (or of R rows) and which of its P places are no padding."""

    cache: Any
    mask_GP: torch.Tensor
