"""How many requests one worker keeps in flight: slow start, then additive increase, multiplicative decrease.

    success:  limit + 1 while starting (doubles per round trip), then limit + 1/limit, up to the ceiling
    overload: limit * 0.7, at most once per second (a burst of refusals is one event)

The rules are pure functions; `Gate` lets coroutines through by them. Overload is an answer 429 or a time-out.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, replace

START = 4
CUT = 0.7
CUT_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Concurrency:
    limit: float
    ceiling: int
    starting: bool = True
    """True until the first overload."""
    cut_at_s: float = -math.inf


def start_concurrency(ceiling: int) -> Concurrency:
    """Begins low, so that a wrong key or a server that is down costs a handful of requests."""
    return Concurrency(float(min(START, ceiling)), ceiling)


def after_success(state: Concurrency) -> Concurrency:
    if state.limit >= state.ceiling:
        return state
    step = 1.0 if state.starting else 1.0 / state.limit
    return replace(state, limit=min(float(state.ceiling), state.limit + step))


def after_overload(state: Concurrency, now_s: float) -> Concurrency:
    if now_s - state.cut_at_s < CUT_EVERY_S:
        return state
    return replace(state, limit=max(1.0, state.limit * CUT), starting=False, cut_at_s=now_s)


class Gate:
    """At most `int(concurrency.limit)` holders at a time; first come, first served. `async with gate: ...`"""

    def __init__(self, concurrency: Concurrency) -> None:
        self.concurrency = concurrency
        self.held = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def succeeded(self) -> None:
        self.concurrency = after_success(self.concurrency)
        self._let_in()

    def overloaded(self, now_s: float) -> None:
        self.concurrency = after_overload(self.concurrency, now_s)

    async def __aenter__(self) -> None:
        if not self._waiting and self.held < int(self.concurrency.limit):
            self.held += 1
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # let in and cancelled at once
                self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self.held -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self.held < int(self.concurrency.limit):
            future = self._waiting.popleft()
            if not future.done():
                self.held += 1
                future.set_result(None)
