"""Every paid request is noted in the ledger before it is sent, so that a crash leaves no spending unseen.

    Announcer.announce(key, usd) -> ticket ... request ... -> Settled(ticket, doubt) -> Ledger.append

A ticket that is settled without a doubt costs what its answer's row says, or nothing (the provider refused). One that
is settled with a doubt (time-out, broken body), or whose process died first, may have been billed or not: the ledger
lists it as unconfirmed, at its estimate. So `spent <= invoice <= spent + unconfirmed`, as far as estimates are high.

Notes are collected for LINGER_S and committed together, before the questions wait for their permits: the rate does not
suffer. What a killed process leaves is, per batch, at most `asking.TASKS_PER_REQUEST` times its requests in flight, and
the answers that had come since the last write to the ledger (`recording.FLUSH_ROWS`, `FLUSH_AFTER_S`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

LINGER_S = 0.03
"""The announcer waits so long for more requests where its last call just ended: one commit then serves many."""
MAX_INTENTS = 512


class Intent(NamedTuple):
    """One request that is about to be sent."""

    ticket: int
    """Random, 62 bits: two processes never share one, and a repeated call changes nothing."""
    key: bytes
    """Of the question, in joint mode of the first."""
    usd: float
    """Its estimate, rather too high than too low."""


class Settled(NamedTuple):
    """One request that has ended."""

    ticket: int
    doubt: str = ""
    """Why it may have been billed although no answer came; empty where what it cost is known."""


class IntentLedger(Protocol):
    async def announce(self, intents: Sequence[Intent]) -> None:
        """Returns when they are on the disk."""
        ...


class Announcer:
    """One per worker: many waiting coroutines, few commits."""

    def __init__(self, ledger: IntentLedger) -> None:
        self._ledger = ledger
        self._waiting: list[tuple[Intent, asyncio.Future[None]]] = []
        self._pump: asyncio.Task[None] | None = None
        self._called_s = 0.0

    async def announce(self, key: bytes, usd: float) -> int:
        """The request's ticket, once the ledger holds it. Raises what the ledger raises."""
        intent = Intent(random.getrandbits(62), key, usd)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((intent, future))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        await future
        return intent.ticket

    async def _run(self) -> None:
        while self._waiting:
            linger_s = self._called_s + LINGER_S - time.monotonic()
            if linger_s > 0.0 and len(self._waiting) < MAX_INTENTS:
                await asyncio.sleep(linger_s)
            taken, self._waiting = self._waiting[:MAX_INTENTS], self._waiting[MAX_INTENTS:]
            error: BaseException | None = None
            try:
                await self._ledger.announce([intent for intent, _ in taken])
            except BaseException as raised:  # noqa: BLE001 - whoever waits gets it
                error = raised
            self._called_s = time.monotonic()
            for _, future in taken:
                if future.done():
                    continue
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
