"""Permits to send a request: many waiting coroutines, few calls to the one limiter.

The waiters of a worker queue here; one pump asks the limiter for as many as wait and hands them out at the times that
the limiter gave. Permits are fetched at most `rate.LimiterState.lookahead_s` ahead, and a pause that the limiter
reports holds back the ones already fetched, so N workers share a limit exactly and a Retry-After stops all of them.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.breaker import News
from morlaif_ray.feedback.headers import RateHints
from morlaif_ray.feedback.rate import Cost, Grant

MAX_WANTED = 256
MAX_NAP_S = 1.0
"""Longest nap between two calls to the limiter, so that a new pause or a refund is seen soon."""
LINGER_S = 0.02
"""The pump waits so long for more waiters where the last call just ended: one call then serves many."""

REFUND_NAP_S = 0.05
NOTHING = Cost(0.0, 0.0)


class BudgetReachedError(FeedbackError):
    """`feedback.budget_usd` allows no further request. What was paid for is in the ledger."""

    exit_code = 8


class Limiter(Protocol):
    """The cluster's one limiter as a worker sees it."""

    async def acquire(self, wanted: Sequence[Cost], estimated: Cost, actual: Cost) -> Grant:
        """Grants from the front; `estimated` and `actual` settle requests that have ended since the last call."""
        ...

    async def pause(self, wait_s: float) -> None: ...

    async def report(self, news: News, hints: RateHints | None) -> None:
        """How the requests since the last report went, and what the provider's headers said."""
        ...


class Permits:
    """One per worker."""

    def __init__(self, limiter: Limiter, beat: Callable[[], None]) -> None:
        self._limiter = limiter
        self._beat = beat
        self._waiting: deque[tuple[Cost, asyncio.Future[None]]] = deque()
        self._timed: list[tuple[float, int, Cost, asyncio.Future[None]]] = []
        self._number = 0
        self._outstanding = 0  # permits given out whose requests have not ended
        self._timer: asyncio.TimerHandle | None = None
        self._pump: asyncio.Task[None] | None = None
        self._called_s = 0.0
        self._paused_until_s = 0.0
        self._estimated = NOTHING
        self._actual = NOTHING
        self._news = News()
        self._hints: RateHints | None = None
        self._told_s = time.monotonic()

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
        self._outstanding -= 1
        self._estimated = _add(self._estimated, estimated)
        self._actual = _add(self._actual, actual)

    def succeeded(self) -> None:
        news = self._news
        self._news = News(news.succeeded + 1, news.failed, 0, news.error)

    def failed(self, error: str) -> None:
        news = self._news
        self._news = News(
            news.succeeded, news.failed + 1, news.failed_since_success + 1, error[:200]
        )

    def learn(self, hints: RateHints) -> None:
        """Notes what the provider's headers said; the newest count."""
        self._hints = hints

    def refuse(self, error: BaseException) -> None:
        """Nobody waits any longer: everyone who does gets `error`."""
        self._refuse_all(error)
        for *_, cost, future in self._timed:
            self.settle(cost, NOTHING)
            if not future.done():
                future.set_exception(error)
        self._timed.clear()

    async def pause(self, wait_s: float) -> None:
        self._hold(wait_s)
        await self._limiter.pause(wait_s)

    async def _run(self) -> None:
        while self._waiting:
            linger_s = self._called_s + LINGER_S - time.monotonic()
            if linger_s > 0.0 and len(self._waiting) < MAX_WANTED:
                await asyncio.sleep(linger_s)
            await self._round()

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        """Whoever waits must hear of an error, whatever it was."""
        error = asyncio.CancelledError() if pump.cancelled() else pump.exception()
        if error is not None:
            self._refuse_all(error)

    async def _round(self) -> None:
        await self._tell()
        wanted = [cost for cost, _ in list(self._waiting)[:MAX_WANTED]]
        estimated, actual = self._estimated, self._actual
        self._estimated = self._actual = NOTHING
        answer = await self._limiter.acquire(wanted, estimated, actual)
        self._called_s = time.monotonic()
        self._beat()
        if answer.given_up:
            raise FeedbackError(answer.given_up)
        if answer.pause_s > 0.0:
            self._hold(answer.pause_s)
        self._hand_out(answer)
        if answer.out_of_budget and self._outstanding:
            # Requests in flight were reserved at a high estimate: what they give back may pay for more.
            await asyncio.sleep(REFUND_NAP_S)
        elif answer.out_of_budget:
            self._refuse_all(
                BudgetReachedError(
                    "feedback.budget_usd is reached; answers so far are in the ledger: raise budget_usd and run the "
                    "same command again"
                )
            )
        elif self._waiting and answer.count < len(wanted):
            await asyncio.sleep(min(max(answer.wait_s, 0.001), MAX_NAP_S))

    async def _tell(self) -> None:
        """Reports what is new. Successes alone can wait: they change nothing while the breaker is closed."""
        urgent = self._news.failed or self._hints is not None
        if not urgent and self._called_s - self._told_s < MAX_NAP_S:
            return
        news, hints = self._news, self._hints
        self._news, self._hints = News(), None
        self._told_s = time.monotonic()
        if news.succeeded or urgent:
            await self._limiter.report(news, hints)

    def _hand_out(self, answer: Grant) -> None:
        now_s = time.monotonic()
        starts_s = answer.starts_s or (0.0,) * answer.count
        for offset_s in starts_s:
            cost, future = self._waiting.popleft()
            self._number += 1
            self._outstanding += 1
            heapq.heappush(self._timed, (now_s + offset_s, self._number, cost, future))
        self._release()

    def _release(self) -> None:
        """Lets those go whose time has come, and sets the alarm for the next."""
        now_s = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._timed and max(self._timed[0][0], self._paused_until_s) <= now_s + 1e-3:
            _, _, cost, future = heapq.heappop(self._timed)
            if future.done():  # its waiter was cancelled: give the permit back
                self.settle(cost, NOTHING)
            else:
                future.set_result(None)
        if self._timed:
            wait_s = max(self._timed[0][0], self._paused_until_s) - now_s
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._release)

    def _hold(self, wait_s: float) -> None:
        """Moves the permits that are not used yet behind the pause, evenly as they were."""
        now_s = time.monotonic()
        late_s = now_s + wait_s - max(self._paused_until_s, now_s)
        if late_s <= 0.0:
            return
        self._paused_until_s = now_s + wait_s
        self._timed = [(max(at_s, now_s) + late_s, *rest) for at_s, *rest in self._timed]  # type: ignore[misc]

    def _refuse_all(self, error: BaseException) -> None:
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)


def _add(left: Cost, right: Cost) -> Cost:
    return Cost(left.tokens + right.tokens, left.usd + right.usd)
