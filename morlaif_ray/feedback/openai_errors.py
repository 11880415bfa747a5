"""What an OpenAI-compatible provider's errors mean, in one line each and without the key."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping

import openai

from morlaif_ray.feedback.client import AttemptError

MESSAGE_CHARS = 160
"""Longest excerpt of a provider's message."""


def explain_status(
    error: openai.APIStatusError, *, where: str, model: str, key_name: str, key: str
) -> AttemptError:
    """An HTTP error as the AttemptError that `retry.decide` acts on."""
    status = error.status_code
    wait_s = retry_after_s(error.response.headers, time.time())
    text = f"{where} answered HTTP {status}: {excerpt(error, key)}"
    if status in (401, 403):
        # The provider's text may quote a part of the key: leave it out.
        return AttemptError(
            "auth",
            f"{where} refused the key in {key_name} (HTTP {status}); set it to a valid key",
        )
    if status == 404:
        return AttemptError(
            "not_found",
            f"{where} knows no model '{model}' (HTTP 404); correct model or base_url",
        )
    if status == 429 and error.code == "insufficient_quota":
        return AttemptError("quota", f"the account behind {key_name} has no quota left (HTTP 429)")
    if status == 429:
        return AttemptError("rate_limit", text, wait_s)
    if status == 408 or status >= 500:
        return AttemptError("server", text, wait_s)
    return AttemptError("bad_request", text)


def excerpt(error: BaseException | str, key: str) -> str:
    """One short line of a message, the key blotted out."""
    text = " ".join(str(error).split()).replace(key, "<key>")
    return text[:MESSAGE_CHARS] + ("..." if len(text) > MESSAGE_CHARS else "")


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Seconds from `retry-after-ms` or `retry-after` (seconds or an HTTP date); None where there is neither."""
    millis, plain = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if millis is not None:
            return max(0.0, float(millis) / 1000.0)
        if plain is not None:
            return max(0.0, float(plain))
    except ValueError:
        pass
    if plain is None:
        return None
    date = email.utils.parsedate_tz(plain)
    return max(0.0, email.utils.mktime_tz(date) - now_s) if date is not None else None
