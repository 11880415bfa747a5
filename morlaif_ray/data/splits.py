"""Which split a prompt falls into, and which slot a response: by content and seed, never by row number."""

from __future__ import annotations

from morlaif_ray.config.inputs import SplitShares
from morlaif_ray.seeding import stable_hash, unit_interval
from morlaif_ray.types import SPLITS, Prompt, ResponsePair, Split


def assign_split(seed: int, prompt: str, shares: SplitShares) -> Split:
    """The split of a prompt's text; the same in every process, and for every row that carries the prompt."""
    position = unit_interval(seed, "split", prompt)
    upper = 0.0
    for split in SPLITS:
        upper += getattr(shares, split)
        if position < upper:
            return split
    # The shares sum to 1 within rounding: a position in the gap belongs to the last split that is not empty.
    return next(split for split in reversed(SPLITS) if getattr(shares, split) > 0)


def make_prompt(seed: int, text: str, shares: SplitShares) -> Prompt:
    return Prompt(stable_hash("prompt", text), text, assign_split(seed, text, shares))


def make_pair(seed: int, prompt: Prompt, first: str, second: str, label: float) -> ResponsePair:
    """A pair whose slots are drawn by a seeded coin on its content, so that the better one is not always `a`.

    `label` is 1.0 where `first` is better, 0.0 where `second`, NaN where unknown. The coin ignores order and label:
    the same two responses come out as the same pair whichever way round they were given.
    """
    low, high = sorted((first, second))
    heads = unit_interval(seed, "slot", prompt.text, low, high) < 0.5
    response_a, response_b = (low, high) if heads else (high, low)
    return ResponsePair(
        pair_id=stable_hash("pair", prompt.text, response_a, response_b),
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        response_a=response_a,
        response_b=response_b,
        split=prompt.split,
        human_label=label if response_a == first else 1.0 - label,  # NaN stays NaN
    )
