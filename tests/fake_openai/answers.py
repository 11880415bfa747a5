"""The fake judge's completions in every form in which the client asks: one token, reasoning, JSON, joint JSON.

Whatever the form, the opinion is `server.true_log_odds` of the two responses: a known function of the pair. In a joint
answer the principles whose name begins with "not_" get the other letter.
"""

from __future__ import annotations

import json
import math
from typing import Any


def shaped_answer(body: dict[str, Any], log_odds: float, model: str) -> dict[str, Any] | None:
    """A completion in the form that the body asks for; None where it asks for one plain token."""
    limit = body.get("max_tokens") or body.get("max_completion_tokens")
    prompt_tokens = sum(len(message["content"].split()) for message in body["messages"])
    letter = "A" if log_odds > 0 else "B"
    if "response_format" in body:
        properties = body["response_format"]["json_schema"]["schema"]["properties"]
        answer = {
            name: _field(kind, -log_odds if name.startswith("not_") else log_odds)
            for name, kind in properties.items()
        }
        return _completion(json.dumps(answer), None, model, prompt_tokens, 4 * len(answer))
    if limit is not None and limit > 1:
        return _reasoned(log_odds, letter, limit, model, prompt_tokens)
    return None


def _field(kind: dict[str, Any], log_odds: float) -> str | int:
    """A letter, a strength from 0 to 100, or any text: whatever the field's schema wants."""
    if kind["type"] == "integer":
        return round(100.0 / (1.0 + math.exp(-log_odds)))
    return ("A" if log_odds > 0 else "B") if "enum" in kind else "because"


def _reasoned(
    log_odds: float, letter: str, limit: int, model: str, prompt_tokens: int
) -> dict[str, Any]:
    """ "A is long . Answer : A" token by token; only the last letter holds the opinion."""
    words = [
        "A",
        " is",
        " one",
        " thing",
        ",",
        " B",
        " another",
        ".",
        "\n",
        "Answer",
        ":",
        f" {letter}",
    ]
    log_a = -math.log1p(math.exp(-log_odds))
    opinion = [(" A", log_a), (" B", log_a - log_odds)]
    tokens = [
        _token(
            word, opinion if place == len(words) - 1 else [(word, -0.01), ("A", -5.0), ("B", -6.0)]
        )
        for place, word in enumerate(words)
    ][:limit]
    text = "".join(words[:limit])
    reason = "length" if limit < len(words) else "stop"
    return _completion(text, tokens, model, prompt_tokens, len(tokens), reason)


def _token(text: str, top: list[tuple[str, float]]) -> dict[str, Any]:
    alternatives = [{"token": t, "logprob": p, "bytes": None} for t, p in top]
    return {"token": text, "logprob": top[0][1], "bytes": None, "top_logprobs": alternatives}


def _completion(
    text: str,
    tokens: list[dict[str, Any]] | None,
    model: str,
    prompt_tokens: int,
    completion_tokens: int,
    finish_reason: str = "stop",
) -> dict[str, Any]:
    logprobs = {"content": tokens, "refusal": None} if tokens is not None else None
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def one_token_answer(body: dict[str, Any], log_odds: float, model: str) -> dict[str, Any]:
    """A plain completion of one token with its alternatives; A and B have 0.9 of the probability."""
    log_a = -math.log1p(math.exp(-log_odds)) + math.log(0.9)
    token = _token("A", [("A", log_a), (" B", log_a - log_odds), ("The", math.log(0.1))])
    prompt_tokens = sum(len(message["content"].split()) for message in body["messages"])
    return _completion("A", [token], model, prompt_tokens, 1, "length")
