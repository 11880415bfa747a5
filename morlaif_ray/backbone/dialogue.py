"""The one template: how a dialogue becomes text and tokens, the same for training, scoring and serving.

A prompt ends with "\\n\\nAssistant:", a response begins with a space, and their concatenation is the dialogue.
Truncation keeps the end. A text scored by a decoder always ends with EOS, whose hidden state carries the score; an
encoder's text stands between its [CLS] and [SEP].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
TOKENIZER_CHUNK = 1024
"""Texts per call of the tokenizer."""


def with_leading_space(response: str) -> str:
    """Decoders of word-level tokenizers drop the space that separates a response from its turn marker."""
    return response if response.startswith(" ") else f" {response}"


def dialogue_text(prompt: str, response: str) -> str:
    return prompt + with_leading_space(response)


def encode_prompt(tokenizer: Any, prompt: str, max_tokens: int) -> list[int]:
    """Token ids of the prompt, its last `max_tokens` when it is longer (the end of a dialogue matters most)."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=True)["input_ids"]
    return _end_of(ids, max_tokens)


def encode_scored_text(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """Token ids of a whole dialogue for a preference model: its end, then EOS; at most `max_length`."""
    ids: list[int] = tokenizer(text, add_special_tokens=True)["input_ids"]
    return [*_end_of(ids, max_length - 1), tokenizer.eos_token_id]


def encode_scored_texts(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """`encode_scored_text` of many texts in few calls, which a fast tokenizer spreads over its own loop."""
    rows: list[list[int]] = []
    for start in range(0, len(texts), TOKENIZER_CHUNK):
        chunk = list(texts[start : start + TOKENIZER_CHUNK])
        for ids in tokenizer(chunk, add_special_tokens=True)["input_ids"]:
            rows.append([*_end_of(ids, max_length - 1), tokenizer.eos_token_id])
    return rows


def encode_framed_texts(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of whole dialogues for an encoder: [CLS], the end of the dialogue, [SEP]; at most `max_length`."""
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows: list[list[int]] = []
    for start in range(0, len(texts), TOKENIZER_CHUNK):
        chunk = list(texts[start : start + TOKENIZER_CHUNK])
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            rows.append([first, *_end_of(ids, max_length - 2), last])
    return rows


def _end_of(ids: list[int], num: int) -> list[int]:
    """The last `num` ids, none for 0 (`ids[-0:]` would be all of them)."""
    return ids[max(0, len(ids) - num) :]
