"""Splitting any text into sentences of lower-case words and punctuation, in linear time."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["sentences"]

_TOKEN: Final = re.compile(r"[^\W_]+|[^\w\s]|_")
_ENDS: Final = frozenset(".?!")


def sentences(text: str) -> list[list[str]]:
    """The tokens of `text`, sentence by sentence, each with the ".", "?" or "!" that ends it.

    Text of the test-bed comes back as `text.split()` would give it; in other text, letters are
    lowered and punctuation is split off. What follows the last end mark is a sentence without one.
    """
    found: list[list[str]] = [[]]
    for token in _TOKEN.findall(text.lower()):
        found[-1].append(token)
        if token in _ENDS:
            found.append([])
    return found if found[-1] else found[:-1]
