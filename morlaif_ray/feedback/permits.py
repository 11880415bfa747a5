"""Permits to send a request: many waiting coroutines, few calls to the one limiter.

The waiters of a worker queue here; one pump asks the limiter for as many as wait. No permit is hoarded, so a
Retry-After that one worker meets holds all of them back at once, and N workers share the limit exactly.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.rate import Cost, Grant

MAX_WANTED = 256
MAX_NAP_S = 1.0
"""Longest nap between two calls to the limiter, so that a new pause or a refund is seen soon."""

NOTHING = Cost(0.0, 0.0)


class BudgetReachedError(FeedbackError):
    """`feedback.budget_usd` allows no further request. What was paid for is in the ledger."""


class Limiter(Protocol):
    """The cluster's one limiter as a worker sees it."""

    async def acquire(self, wanted: Sequence[Cost], estimated: Cost, actual: Cost) -> Grant:
        """Grants from the front; `estimated` and `actual` settle requests that have ended since the last call."""
        ...

    async def pause(self, wait_s: float) -> None: ...


class Permits:
    """One per worker."""

    def __init__(self, limiter: Limiter, beat: Callable[[], None]) -> None:
        self._limiter = limiter
        self._beat = beat
        self._waiting: deque[tuple[Cost, asyncio.Future[None]]] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._estimated = NOTHING
        self._actual = NOTHING

    async def take(self, cost: Cost) -> None:
        """Returns when a request of this cost may start; BudgetReachedError when none ever may."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((cost, future))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
            self._pump.add_done_callback(self._pump_ended)
        await future

    def settle(self, estimated: Cost, actual: Cost) -> None:
        """Notes what an ended request really used; told to the limiter with the next call."""
        self._estimated = _add(self._estimated, estimated)
        self._actual = _add(self._actual, actual)

    async def pause(self, wait_s: float) -> None:
        await self._limiter.pause(wait_s)

    async def _run(self) -> None:
        while self._waiting:
            await self._round()

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        """Whoever waits must hear of an error, whatever it was."""
        error = asyncio.CancelledError() if pump.cancelled() else pump.exception()
        if error is not None:
            self._refuse_all(error)

    async def _round(self) -> None:
        wanted = [cost for cost, _ in list(self._waiting)[:MAX_WANTED]]
        estimated, actual = self._estimated, self._actual
        self._estimated = self._actual = NOTHING
        answer = await self._limiter.acquire(wanted, estimated, actual)
        self._beat()
        for _ in range(answer.count):
            cost, future = self._waiting.popleft()
            if future.done():  # its waiter was cancelled: give the permit back
                self.settle(cost, NOTHING)
            else:
                future.set_result(None)
        if answer.out_of_budget:
            self._refuse_all(
                BudgetReachedError(
                    "feedback.budget_usd is reached; answers so far are in the ledger: raise budget_usd and run the "
                    "same command again"
                )
            )
        elif self._waiting:
            await asyncio.sleep(min(max(answer.wait_s, 0.001), MAX_NAP_S))

    def _refuse_all(self, error: BaseException) -> None:
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)


def _add(left: Cost, right: Cost) -> Cost:
    return Cost(left.tokens + right.tokens, left.usd + right.usd)
