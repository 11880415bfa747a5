"""Rate and budget arithmetic: token buckets as values, and the decision how many requests may start now.

Contract: pure functions of (state, now). `now` is any monotonic clock in seconds. State is never mutated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from morlaif_ray.feedback.headers import Allowance, RateHints

BURST_S = 1.0
"""A bucket holds this many seconds' worth, so an idle limiter never releases more than that at once."""


@dataclass(frozen=True, slots=True)
class TokenBucket:
    rate_per_s: float
    capacity: float
    level: float
    """What may be spent now; negative after a request larger than the capacity."""
    updated_s: float


def empty_bucket(per_minute: float, now_s: float, burst_s: float = BURST_S) -> TokenBucket:
    """A bucket for a provider's per-minute limit; holds at least one unit so that a slow limit still moves.

    It starts empty: a limiter that was restarted must not release a second burst.
    """
    rate = per_minute / 60.0
    capacity = max(1.0, rate * burst_s)
    return TokenBucket(rate, capacity, 0.0, now_s)


def refill(bucket: TokenBucket, now_s: float) -> TokenBucket:
    elapsed = max(0.0, now_s - bucket.updated_s)
    level = min(bucket.capacity, bucket.level + elapsed * bucket.rate_per_s)
    return replace(bucket, level=level, updated_s=max(now_s, bucket.updated_s))


def wait_for(bucket: TokenBucket, amount: float) -> float:
    """Seconds until `amount` may be taken; an amount above the capacity waits for a full bucket only."""
    needed = min(amount, bucket.capacity) - bucket.level
    # A hair of tolerance: after waiting exactly this long, rounding must not ask for one more nanosecond.
    return needed / bucket.rate_per_s if needed > 1e-9 * bucket.capacity else 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request will use, estimated before it is sent."""

    tokens: float
    usd: float


@dataclass(frozen=True, slots=True)
class LimiterState:
    requests: TokenBucket | None
    tokens: TokenBucket | None
    paused_until_s: float
    """Nobody may start before (Retry-After)."""
    usd_left: float
    """Budget minus recorded spending minus what is in flight; infinite without a budget."""
    lookahead_s: float = 0.0
    """Requests may be granted so long before their time: N workers then ask seldom and still start evenly."""
    most_requests_per_s: float = math.inf
    """The user's own limit; what a provider's headers say never raises the rate above it."""
    most_tokens_per_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Grant:
    """How many of the wanted requests, from the front, may start now."""

    count: int
    wait_s: float
    """Seconds after which asking again makes sense; 0 when all were granted."""
    out_of_budget: bool = False
    starts_s: tuple[float, ...] = ()
    """Seconds from now at which each granted request may start; empty: all at once."""
    pause_s: float = 0.0
    """Everyone holds back for so long, permits granted earlier included."""
    given_up: str = ""
    """Why nothing will ever be granted again; empty while there is hope."""


def grant(state: LimiterState, wanted: Sequence[Cost], now_s: float) -> tuple[LimiterState, Grant]:
    """Grants as many requests as limits and budget allow, in order, at most `lookahead_s` before their time."""
    if now_s < state.paused_until_s:
        pause_s = state.paused_until_s - now_s
        return state, Grant(0, pause_s, pause_s=pause_s)
    requests = refill(state.requests, now_s) if state.requests else None
    tokens = refill(state.tokens, now_s) if state.tokens else None
    usd_left = state.usd_left
    starts_s: list[float] = []
    wait_s, out_of_budget = 0.0, False
    for cost in wanted:
        if cost.usd > usd_left:
            out_of_budget = True
            break
        wait_s = max(
            wait_for(requests, 1.0) if requests else 0.0,
            wait_for(tokens, cost.tokens) if tokens else 0.0,
        )
        if wait_s > state.lookahead_s:
            # Half of the time ahead is free again by then: a few calls per second, however many workers.
            wait_s -= state.lookahead_s / 2.0
            break
        starts_s.append(wait_s)
        wait_s = 0.0
        requests = replace(requests, level=requests.level - 1.0) if requests else None
        tokens = replace(tokens, level=tokens.level - cost.tokens) if tokens else None
        usd_left -= cost.usd
    after = replace(state, requests=requests, tokens=tokens, usd_left=usd_left)
    offsets = tuple(starts_s) if any(starts_s) else ()
    return after, Grant(len(starts_s), wait_s, out_of_budget, offsets)


def settle(state: LimiterState, estimated: Cost, actual: Cost) -> LimiterState:
    """Returns what the estimate took too much, or takes what it took too little, once the usage is known."""
    tokens = state.tokens
    if tokens is not None:
        level = min(tokens.capacity, tokens.level + estimated.tokens - actual.tokens)
        tokens = replace(tokens, level=level)
    return replace(state, tokens=tokens, usd_left=state.usd_left + estimated.usd - actual.usd)


def pause(state: LimiterState, until_s: float) -> LimiterState:
    """Holds everyone back until `until_s`; an earlier pause is never shortened."""
    return replace(state, paused_until_s=max(state.paused_until_s, until_s))


def learn(state: LimiterState, hints: RateHints, now_s: float, burst_s: float) -> LimiterState:
    """Takes over what a response said of the limits: a lower rate, and less left than we thought.

    Others may use the same account: what they took shows in `remaining`. Nothing is ever learnt upwards from a
    `remaining`, and no rate rises above the user's own.
    """
    return replace(
        state,
        requests=_learnt(state.requests, hints.requests, state.most_requests_per_s, now_s, burst_s),
        tokens=_learnt(state.tokens, hints.tokens, state.most_tokens_per_s, now_s, burst_s),
    )


def _learnt(
    bucket: TokenBucket | None, said: Allowance, most_per_s: float, now_s: float, burst_s: float
) -> TokenBucket | None:
    per_minute = said.limit if said.reset_s is not None and said.reset_s <= 60.0 else None
    if per_minute:
        rate = min(most_per_s, per_minute / 60.0)
        if bucket is None:
            bucket = replace(empty_bucket(rate * 60.0, now_s, burst_s))
            bucket = replace(bucket, level=bucket.capacity)
        elif rate != bucket.rate_per_s:
            bucket = refill(bucket, now_s)
            capacity = max(1.0, rate * burst_s)
            level = min(bucket.level, capacity)
            bucket = replace(bucket, rate_per_s=rate, capacity=capacity, level=level)
    if bucket is not None and said.remaining is not None:
        bucket = refill(bucket, now_s)
        bucket = replace(bucket, level=min(bucket.level, said.remaining))
    return bucket
