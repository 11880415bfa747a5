"""A pair that is too long for the judge's context: what goes first, as a pure function of its texts.

    1. the oldest turns of the conversation, one by one; the last message always stays whole
    2. both responses are cut at the end to one common length, so that neither is favoured by the cut

What then still does not fit is not asked: the question fails with a reason (`fit` returns None).
The same texts are cut for every principle and in both orders, so K questions still share their prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from morlaif_ray.errors import ConfigError

CHARS_PER_TOKEN = 4
MIN_RESPONSE_TOKENS = 8
"""Responses cut to less than this each are not worth comparing."""

CountTokens = Callable[[str], int]
_TURN = re.compile(r"\n\n(?=(?:Human|Assistant):)")


@dataclass(frozen=True, slots=True)
class Fitted:
    """The texts as shown to the judge."""

    conversation: str
    first: str
    second: str
    truncated: bool


def count_by_chars(text: str) -> int:
    """Tokens at 4 characters each, rounded up: right for English, too few for code and other scripts."""
    return -(-len(text) // CHARS_PER_TOKEN)


def load_counter(tokenizer: Path | None) -> CountTokens:
    """Counts with a `tokenizer.json` (or a folder that holds one); ConfigError where it cannot be read."""
    if tokenizer is None:
        return count_by_chars
    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not path.is_file():
        raise ConfigError(
            f"feedback.tokenizer: {path} is not a file; name a tokenizer.json, or leave it out (characters / 4)"
        )
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the Rust library raises bare Exceptions
        raise ConfigError(f"feedback.tokenizer: {path} is no tokenizer.json ({error})") from None

    def count(text: str) -> int:
        return len(loaded.encode(text, add_special_tokens=False).ids)

    return count


def fit(
    conversation: str, first: str, second: str, max_tokens: int, count: CountTokens
) -> Fitted | None:
    """The texts within `max_tokens` in all; None where that cannot be without losing the last message."""
    responses = count(first) + count(second)
    if count(conversation) + responses <= max_tokens:
        return Fitted(conversation, first, second, False)
    turns = _TURN.split(conversation)
    while len(turns) > 1 and count("\n\n".join(turns)) + responses > max_tokens:
        turns.pop(0)
    kept = "\n\n".join(turns)
    room = max_tokens - count(kept)
    if responses > room:
        if room < 2 * MIN_RESPONSE_TOKENS:
            return None
        length = _common_length(first, second, room, count)
        first, second = first[:length], second[:length]
    return Fitted(kept, first, second, True)


def _common_length(first: str, second: str, room: int, count: CountTokens) -> int:
    """The largest number of characters to which both may be cut so that they need at most `room` tokens."""
    low, high = 0, max(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if count(first[:middle]) + count(second[:middle]) <= room:
            low = middle
        else:
            high = middle - 1
    return low
