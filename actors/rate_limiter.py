"""One limiter for the whole cluster: requests/min, tokens/min, Retry-After, budget.

A plain class around the arithmetic of `morlaif_ray.feedback.rate`; `spawn_rate_limiter` gives it a process. Workers ask
in batches, so one call carries the permits of many requests. After a restart its buckets start empty (cautious) and its
spending comes from the ledger; what was in flight at that moment is settled by the workers that have it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from morlaif_ray.feedback.rate import (
    Cost,
    Grant,
    LimiterState,
    empty_bucket,
    grant,
    pause,
    settle,
)

if TYPE_CHECKING:
    import ray.actor


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
        self._state = LimiterState(
            requests=empty_bucket(requests_per_minute, now_s) if requests_per_minute else None,
            tokens=empty_bucket(tokens_per_minute, now_s) if tokens_per_minute else None,
            paused_until_s=now_s,
            usd_left=math.inf if budget_usd is None else budget_usd - spent_usd(),
        )

    def acquire(self, wanted: Sequence[Cost], estimated: Cost, actual: Cost) -> Grant:
        """Settles what has ended, then grants from the front of `wanted`."""
        self._state, answer = grant(settle(self._state, estimated, actual), wanted, self._clock())
        return answer

    def pause(self, wait_s: float) -> None:
        """Nobody starts for `wait_s` seconds: the provider said so."""
        self._state = pause(self._state, self._clock() + wait_s)


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
        ledger = ray.get_actor(ledger_name)
        return float(ray.get(ledger.spent_usd.remote(), timeout=timeout_s))

    remote = ray.remote(RateLimiter)
    # acquire may run twice after a crash: the first grant died with the state that it was taken from.
    return remote.options(
        name=name, num_cpus=0, max_restarts=max_restarts, max_task_retries=max_restarts
    ).remote(requests_per_minute, tokens_per_minute, budget_usd, spent_usd)
