"""Any OpenAI-compatible chat completions endpoint, asked for one token with its log-probabilities.

The SDK's own retries are off: `retry.decide` is the only place that retries. The key comes from the environment
variable that the config names, and appears in no message.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import openai

from morlaif_ray.config.judging import OpenAIJudge
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.template import render

MESSAGE_CHARS = 160
"""Longest excerpt of a provider's message."""


class OpenAIClient:
    """FeedbackError at once where the key's environment variable is not set."""

    def __init__(self, judge: OpenAIJudge, template: str) -> None:
        key = os.environ.get(judge.api_key_env, "").strip()
        if not key:
            raise FeedbackError(
                f"environment variable {judge.api_key_env} is not set; put the judge's API key there (any text where "
                f"the server wants none), or name another in feedback.judge.api_key_env"
            )
        self._judge = judge
        self._template = template
        self._key = key
        self._where = judge.base_url or "the provider's default URL"
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=judge.base_url, max_retries=0, timeout=judge.request_timeout_s
        )

    async def ask(self, question: Question) -> RawAnswer:
        messages: list[Any] = [{"role": "user", "content": render(self._template, question)}]
        if self._judge.system_prompt:
            messages.insert(0, {"role": "system", "content": self._judge.system_prompt})
        try:
            # The SDK's time-out counts anew for every chunk; this one is for the whole request.
            async with asyncio.timeout(self._judge.request_timeout_s):
                completion = await self._client.chat.completions.create(
                    model=self._judge.model,
                    messages=messages,
                    max_tokens=1,
                    temperature=0.0,
                    logprobs=True,
                    top_logprobs=self._judge.top_logprobs,
                )
        except (TimeoutError, openai.APITimeoutError):
            raise AttemptError(
                "timeout",
                f"no answer from {self._where} within {self._judge.request_timeout_s:g} s",
            ) from None
        except openai.APIStatusError as error:
            raise self._explain(error) from None
        except openai.APIConnectionError as error:
            cause = (
                type(error.__cause__).__name__
                if error.__cause__ is not None
                else "connection failed"
            )
            raise AttemptError("connection", f"{self._where}: {cause}") from None
        except (openai.OpenAIError, ValueError) as error:
            raise AttemptError("malformed", f"{self._where}: {self._excerpt(error)}") from None
        return _read(completion, self._where)

    async def close(self) -> None:
        await self._client.close()

    def _explain(self, error: openai.APIStatusError) -> AttemptError:
        status = error.status_code
        wait_s = retry_after_s(error.response.headers, time.time())
        text = f"{self._where} answered HTTP {status}: {self._excerpt(error)}"
        if status in (401, 403):
            # The provider's text may quote a part of the key: leave it out.
            return AttemptError(
                "auth",
                f"{self._where} refused the key in {self._judge.api_key_env} (HTTP {status}); set it to a valid key",
            )
        if status == 404:
            return AttemptError(
                "not_found",
                f"{self._where} knows no model '{self._judge.model}' (HTTP 404); correct model or base_url",
            )
        if status == 429 and error.code == "insufficient_quota":
            return AttemptError(
                "quota",
                f"the account behind {self._judge.api_key_env} has no quota left (HTTP 429)",
            )
        if status == 429:
            return AttemptError("rate_limit", text, wait_s)
        if status == 408 or status >= 500:
            return AttemptError("server", text, wait_s)
        return AttemptError("bad_request", text)

    def _excerpt(self, error: BaseException) -> str:
        text = " ".join(str(error).split()).replace(self._key, "<key>")
        return text[:MESSAGE_CHARS] + ("..." if len(text) > MESSAGE_CHARS else "")


def _read(completion: Any, where: str) -> RawAnswer:
    """The first token's alternatives. AttemptError("malformed") where the body is no chat completion."""
    try:
        choice = completion.choices[0]
        usage = completion.usage
        message = choice.message
        tokens = choice.logprobs.content if choice.logprobs is not None else None
        top: dict[str, float] = {}
        for entry in tokens[0].top_logprobs if tokens else ():
            # Two token ids may share one text: their probabilities add up.
            known = top.get(entry.token)
            top[entry.token] = entry.logprob if known is None else _log_add(known, entry.logprob)
        return RawAnswer(
            top_logprobs=top,
            model=str(completion.model or ""),
            prompt_tokens=usage.prompt_tokens if usage is not None else 0,
            completion_tokens=usage.completion_tokens if usage is not None else 0,
            refusal=message.refusal or "",
        )
    except (AttributeError, IndexError, TypeError):
        raise AttemptError("malformed", f"{where}: the body is not a chat completion") from None


def _log_add(left: float, right: float) -> float:
    high, low = max(left, right), min(left, right)
    return high + math.log1p(math.exp(low - high))


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
