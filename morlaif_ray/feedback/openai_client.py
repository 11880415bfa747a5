"""Any OpenAI-compatible chat completions endpoint, or several that serve one model.

The SDK's own retries are off: `retry.decide` is the only place that retries. The key comes from the environment
variable that the config names, and appears in no message.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from morlaif_ray.config.judging import OpenAIBatchJudge, OpenAIJudge
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.endpoints import COOL_S, cooled_last, endpoint_order
from morlaif_ray.feedback.headers import RateHints, read_hints
from morlaif_ray.feedback.openai_errors import excerpt, explain_status, retry_after_s
from morlaif_ray.feedback.openai_requests import read_completion, request_body
from morlaif_ray.feedback.prompting import Prompter
from morlaif_ray.seeding import stable_hash

__all__ = ["OpenAIClient", "key_from_environment", "retry_after_s"]


def key_from_environment(name: str) -> str:
    """FeedbackError in one line where the variable is not set."""
    key = os.environ.get(name, "").strip()
    if not key:
        raise FeedbackError(
            f"environment variable {name} is not set; put the judge's API key there (any text where "
            f"the server wants none), or name another in feedback.judge.api_key_env"
        )
    return key


POOLS = 8
"""Connection pools per server."""


@dataclass(slots=True)
class _Server:
    """One endpoint with its connections."""

    make_client: Callable[[], openai.AsyncOpenAI]
    key: str
    key_name: str
    where: str
    clients: list[openai.AsyncOpenAI] = field(default_factory=list)
    """Taken in turn: a pool looks at each of its connections for every request, so small pools cost less CPU. Each is
    made when its turn first comes: it reads the certificates, and the first request need not wait for all of them."""
    turn: int = -1

    def next_client(self) -> openai.AsyncOpenAI:
        self.turn = (self.turn + 1) % POOLS
        if self.turn == len(self.clients):
            self.clients.append(self.make_client())
        return self.clients[self.turn]


class OpenAIClient:
    """FeedbackError at once where a key's environment variable is not set."""

    def __init__(
        self, judge: OpenAIJudge | OpenAIBatchJudge, prompter: Prompter, seed: int = 0
    ) -> None:
        self._judge = judge
        self._prompter = prompter
        self._seed = seed
        self._hints: RateHints | None = None
        endpoints = judge.endpoints if isinstance(judge, OpenAIJudge) else []
        if endpoints:
            self._servers = [self._server(entry.base_url, entry.api_key_env) for entry in endpoints]
        else:
            self._servers = [self._server(judge.base_url, judge.api_key_env)]
        self._urls = [entry.base_url for entry in endpoints]
        self._weights = [entry.weight for entry in endpoints]
        self._down_until_s = [0.0] * len(self._servers)

    def _server(self, base_url: str | None, key_name: str) -> _Server:
        key = key_from_environment(key_name)

        def make_client() -> openai.AsyncOpenAI:
            return openai.AsyncOpenAI(
                api_key=key,
                base_url=base_url,
                max_retries=0,
                timeout=self._judge.request_timeout_s,
                http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [self._hear]}),
            )

        return _Server(make_client, key, key_name, base_url or "the provider's default URL")

    async def _hear(self, response: Any) -> None:
        """Keeps what a response says of the provider's limits, refusals included."""
        if not any(name.lower().startswith(b"x-ratelimit") for name, _ in response.headers.raw):
            return
        hints = read_hints(response.headers)
        if hints is not None:
            self._hints = hints

    def limits(self) -> RateHints | None:
        """`headers.ReportsLimits`. With several endpoints None: their limits are not one limit."""
        hints, self._hints = self._hints, None
        return hints if len(self._servers) == 1 else None

    async def ask(self, question: Question) -> RawAnswer:
        """One attempt. A server that cannot be reached is passed over within it; the last one's error counts.

        One that was lost after the request had left ends the attempt: it may bill it, and that must be written down.
        """
        body = request_body(self._judge, self._prompter.messages(question), question)
        if len(self._servers) == 1:
            return await self._ask(self._servers[0], question, body)
        # By the texts alone: all principles of a pair go to one server, whose prefix cache then serves them.
        texts = stable_hash(question.prompt, question.first, question.second)
        order = endpoint_order(texts, self._urls, self._weights, self._seed)
        order = cooled_last(order, self._down_until_s, time.monotonic())
        for index in order[:-1]:
            try:
                return await self._ask(self._servers[index], question, body)
            except AttemptError as error:
                if error.kind != "connection":
                    raise
                self._down_until_s[index] = time.monotonic() + COOL_S
                if error.sent:
                    raise
        return await self._ask(self._servers[order[-1]], question, body)

    async def _ask(self, server: _Server, question: Question, body: dict[str, Any]) -> RawAnswer:
        try:
            # The SDK's time-out counts anew for every chunk; this one is for the whole request.
            async with asyncio.timeout(self._judge.request_timeout_s):
                # As `chat.completions.create` does, less its walk over the typed parameters (15% of the CPU).
                completion = await server.next_client().post(
                    "/chat/completions", body=body, cast_to=ChatCompletion
                )
        except (TimeoutError, openai.APITimeoutError):
            raise AttemptError(
                "timeout",
                f"no answer from {server.where} within {self._judge.request_timeout_s:g} s",
            ) from None
        except openai.APIStatusError as error:
            raise explain_status(
                error,
                where=server.where,
                model=self._judge.model,
                key_name=server.key_name,
                key=server.key,
            ) from None
        except openai.APIConnectionError as error:
            cause = (
                type(error.__cause__).__name__
                if error.__cause__ is not None
                else "connection failed"
            )
            raise AttemptError(
                "connection", f"{server.where}: {cause}", sent=cause != "ConnectError"
            ) from None
        except (openai.OpenAIError, ValueError) as error:
            raise AttemptError(
                "malformed", f"{server.where}: {excerpt(error, server.key)}"
            ) from None
        return read_completion(completion, self._judge, question, server.where)

    async def close(self) -> None:
        for server in self._servers:
            for client in server.clients:
                await client.close()
