"""One raw row -> one `Example`. Raises RowProblem with the reason; knows no file and no line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from morlaif_ray.data.dialogues import as_prompt, as_response, join_messages, split_last_turn
from morlaif_ray.data.rows import RowProblem


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with two responses. `first` is the preferred one where `label` is 1, `second` where it is 0."""

    prompt: str
    first: str
    second: str
    label: float
    """1.0, 0.0, or NaN where no one was asked."""


def parse_hh(row: Mapping[str, Any]) -> Example:
    """hh-rlhf: `chosen` and `rejected` are whole dialogues that differ in their last turn."""
    prompt, chosen = split_last_turn(_text(row, "chosen"), "chosen")
    rejected_prompt, rejected = split_last_turn(_text(row, "rejected"), "rejected")
    if prompt != rejected_prompt:
        raise RowProblem("'chosen' and 'rejected' answer different prompts")
    return Example(prompt, chosen, rejected, 1.0)


def parse_pairs(row: Mapping[str, Any]) -> Example:
    """`prompt`, `response_a`, `response_b`, optional `label`: who is better."""
    prompt = as_prompt(_text(row, "prompt"))
    first = as_response(_text(row, "response_a"), "response_a")
    second = as_response(_text(row, "response_b"), "response_b")
    return Example(prompt, first, second, _label(row.get("label")))


def parse_conversational(row: Mapping[str, Any]) -> Example:
    """TRL: `chosen` and `rejected` are message lists; the prompt stands in `prompt` or before their last message."""
    chosen = _messages(row, "chosen")
    rejected = _messages(row, "rejected")
    shared = _messages(row, "prompt") if row.get("prompt") is not None else []
    chosen_prompt, chosen_text = _last_reply(chosen, "chosen")
    rejected_prompt, rejected_text = _last_reply(rejected, "rejected")
    if chosen_prompt != rejected_prompt:
        raise RowProblem("'chosen' and 'rejected' answer different prompts")
    # Some data sets repeat the prompt's messages inside `chosen`; some give them once.
    prompt = chosen_prompt if chosen_prompt[: len(shared)] == shared else shared + chosen_prompt
    return Example(
        join_messages(prompt),
        as_response(chosen_text, "chosen"),
        as_response(rejected_text, "rejected"),
        1.0,
    )


PARSERS: dict[str, Callable[[Mapping[str, Any]], Example]] = {
    "hh": parse_hh,
    "pairs": parse_pairs,
    "conversational": parse_conversational,
}

Messages = list[tuple[str, str]]


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise RowProblem(f"key '{key}' is missing (keys: {', '.join(map(str, row)) or 'none'})")
    value = row[key]
    if not isinstance(value, str):
        hint = "; is this data.source.format: conversational?" if isinstance(value, list) else ""
        raise RowProblem(f"'{key}' must be text, not {type(value).__name__}{hint}")
    return value


def _messages(row: Mapping[str, Any], key: str) -> Messages:
    if key not in row:
        raise RowProblem(f"key '{key}' is missing (keys: {', '.join(map(str, row)) or 'none'})")
    value = row[key]
    if not isinstance(value, list) or not value:
        raise RowProblem(f"'{key}' must be a list of messages, not {type(value).__name__}")
    messages: Messages = []
    for number, message in enumerate(value, start=1):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise RowProblem(
                f"message {number} of '{key}' needs a 'role' (system, user, assistant) and a text 'content'"
            )
        messages.append((role, content))
    return messages


def _last_reply(messages: Messages, key: str) -> tuple[Messages, str]:
    role, content = messages[-1]
    if role != "assistant":
        raise RowProblem(f"the last message of '{key}' must be the assistant's")
    return messages[:-1], content


def _label(value: Any) -> float:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return float("nan")
    known = {"a": 1.0, "b": 0.0}
    if isinstance(value, str) and value.strip().lower() in known:
        return known[value.strip().lower()]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return float(value)
    raise RowProblem(
        f"'label' must be 1 or 'a' (response_a is better), 0 or 'b', or null; not {value!r}"
    )
