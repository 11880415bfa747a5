"""The circuit breaker: when every request of every worker fails, stop asking, and look again now and then.

    closed --20 failures in a row, over all workers--> open --wait--> half open: one probe
      ^                                                  ^               | fails: wait twice as long
      +----------------------- probe succeeds -----------+---------------+ 10th failure: give up

Contract: pure functions of (state, news, now). A 429 is no failure here: the provider is up and says "later".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

OPEN_AFTER = 20
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
PROBE_TIMEOUT_S = 45.0
"""A probe whose result does not arrive (its worker died) is sent anew after so long."""
GIVE_UP_AFTER = 10
"""Probes that failed in a row; with the waits above the provider was down for about five minutes."""


@dataclass(frozen=True, slots=True)
class News:
    """What one worker's requests came to since it told last. Produced by workers, consumed by the limiter."""

    succeeded: int = 0
    failed: int = 0
    """Server errors, time-outs, broken connections, unreadable bodies."""
    failed_since_success: int = 0
    """Those of `failed` that came after the last success; all of them where there was none."""
    error: str = ""
    """The last failure in words."""


@dataclass(frozen=True, slots=True)
class Breaker:
    failures: int = 0
    """Failures in a row over all workers."""
    open_until_s: float | None = None
    """None: closed."""
    probed_at_s: float | None = None
    """When the probe that is under way was sent; None: none is."""
    probes_failed: int = 0
    error: str = ""

    @property
    def gave_up(self) -> bool:
        return self.probes_failed >= GIVE_UP_AFTER


@dataclass(frozen=True, slots=True)
class Passage:
    """How many requests may start: None for as many as you like."""

    most: int | None
    wait_s: float = 0.0


def hear(state: Breaker, news: News, now_s: float) -> Breaker:
    """The state after some news."""
    if news.succeeded:
        state = Breaker()
        news = replace(news, failed=news.failed_since_success)
    if not news.failed:
        return state
    if state.open_until_s is None:
        failures = state.failures + news.failed
        opened = now_s + FIRST_WAIT_S if failures >= OPEN_AFTER else None
        return Breaker(failures, opened, None, 0, news.error)
    if state.probed_at_s is None:  # what was in flight when it opened says nothing new
        return replace(state, error=news.error or state.error)
    failed = state.probes_failed + 1
    wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0**failed)
    return Breaker(state.failures + news.failed, now_s + wait_s, None, failed, news.error)


def passage(state: Breaker, now_s: float) -> tuple[Breaker, Passage]:
    """Whether requests may start now; counts the probe that it lets through."""
    if state.open_until_s is None:
        return state, Passage(None)
    if now_s < state.open_until_s:
        return state, Passage(0, state.open_until_s - now_s)
    if state.probed_at_s is not None and now_s - state.probed_at_s < PROBE_TIMEOUT_S:
        return state, Passage(0, 0.25)
    return replace(state, probed_at_s=now_s), Passage(1)


def describe(state: Breaker) -> str:
    """One line for people; empty while closed."""
    if state.open_until_s is None:
        return ""
    return (
        f"the provider failed {state.failures} requests in a row (last: {state.error}); asking is paused and one "
        f"probe is sent now and then ({state.probes_failed} of {GIVE_UP_AFTER} failed)"
    )
