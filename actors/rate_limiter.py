"""One limiter for the whole cluster: requests/min, tokens/min, Retry-After, rate-limit headers, breaker, budget.

A plain class around the arithmetic of `morlaif_ray.feedback.rate` and `breaker`; `spawn_rate_limiter` gives it a
process. Workers ask in batches, so one call carries the permits of many requests. After a restart its buckets start
empty (cautious) and its spending comes from the ledger, announced requests at their estimates: what was in flight at
that moment is settled by the workers that have it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from morlaif_ray.feedback.breaker import Breaker, News, describe, hear, passage
from morlaif_ray.feedback.headers import RateHints
from morlaif_ray.feedback.rate import (
    Cost,
    Grant,
    LimiterState,
    empty_bucket,
    grant,
    learn,
    pause,
    settle,
)

if TYPE_CHECKING:
    import ray.actor

BURST_S = 0.1
"""After a stall at most this many seconds' worth start at once; what was granted ahead makes up for short ones."""
LOOKAHEAD_S = 0.5
"""Permits are given out so long before their time; a worker then asks about four times a second."""


class RateLimiter:
    """`spent_usd` is called once, at the start; `clock` is any monotonic clock in seconds."""

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        budget_usd: float | None,
        spent_usd: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        now_s = clock()
        requests, tokens = (
            empty_bucket(limit, now_s, BURST_S) if limit else None
            for limit in (requests_per_minute, tokens_per_minute)
        )
        self._state = LimiterState(
            requests=requests,
            tokens=tokens,
            paused_until_s=now_s,
            usd_left=math.inf if budget_usd is None else budget_usd - spent_usd(),
            lookahead_s=LOOKAHEAD_S,
            most_requests_per_s=requests.rate_per_s if requests else math.inf,
            most_tokens_per_s=tokens.rate_per_s if tokens else math.inf,
        )
        self._breaker = Breaker()

    def acquire(self, wanted: Sequence[Cost], estimated: Cost, actual: Cost) -> Grant:
        """Settles what has ended, then grants from the front of `wanted`."""
        now_s = self._clock()
        self._state = settle(self._state, estimated, actual)
        if self._breaker.gave_up:
            return Grant(0, 0.0, given_up=self._farewell())
        self._breaker, allowed = passage(self._breaker, now_s)
        if allowed.most == 0:
            return Grant(0, allowed.wait_s)
        self._state, answer = grant(self._state, list(wanted)[: allowed.most], now_s)
        if allowed.most is not None:
            answer = replace(answer, wait_s=max(answer.wait_s, 0.25))
        return answer

    def pause(self, wait_s: float) -> None:
        """Nobody starts for `wait_s` seconds: the provider said so."""
        self._state = pause(self._state, self._clock() + wait_s)

    def report(self, news: News, hints: RateHints | None = None) -> None:
        """How some worker's requests went, and what the provider said of its limits."""
        now_s = self._clock()
        self._breaker = hear(self._breaker, news, now_s)
        if hints is not None:
            self._state = learn(self._state, hints, now_s, BURST_S)

    def condition(self) -> str:
        """One line for people where the breaker is open; else empty."""
        return describe(self._breaker)

    def _farewell(self) -> str:
        return (
            f"the provider has been failing for minutes: {self._breaker.failures} requests in a row, last: "
            f"{self._breaker.error}; answers so far are in the ledger, run the same command again when it is back"
        )


def spawn_rate_limiter(
    requests_per_minute: float | None,
    tokens_per_minute: float | None,
    budget_usd: float | None,
    *,
    name: str,
    ledger_name: str,
    max_restarts: int,
    timeout_s: float,
) -> ray.actor.ActorHandle:
    import ray

    def spent_usd() -> float:
        # The first limiter grants what is announced itself: it must not count that twice.
        restarted = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        ledger = ray.get_actor(ledger_name)
        return float(ray.get(ledger.spent_usd.remote(restarted), timeout=timeout_s))

    remote = ray.remote(RateLimiter)
    # acquire may run twice after a crash: the first grant died with the state that it was taken from.
    return remote.options(
        name=name, num_cpus=0, max_restarts=max_restarts, max_task_retries=max_restarts
    ).remote(requests_per_minute, tokens_per_minute, budget_usd, spent_usd)
