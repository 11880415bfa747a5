"""Token buckets and budget with a clock of our own."""

from __future__ import annotations

import math

import pytest

from actors.rate_limiter import RateLimiter
from morlaif_ray.feedback.rate import (
    Cost,
    LimiterState,
    empty_bucket,
    grant,
    pause,
    refill,
    settle,
    wait_for,
)

pytestmark = pytest.mark.unit
ONE = Cost(tokens=100.0, usd=0.0)
NOTHING = Cost(0.0, 0.0)


def limited(
    requests_per_minute: float | None = None, tokens_per_minute: float | None = None
) -> LimiterState:
    return LimiterState(
        requests=empty_bucket(requests_per_minute, 0.0) if requests_per_minute else None,
        tokens=empty_bucket(tokens_per_minute, 0.0) if tokens_per_minute else None,
        paused_until_s=0.0,
        usd_left=math.inf,
    )


def test_a_bucket_fills_at_its_rate_and_holds_one_second() -> None:
    bucket = empty_bucket(600.0, now_s=0.0)  # 10 per second
    assert refill(bucket, 0.3).level == pytest.approx(3.0)
    assert refill(bucket, 60.0).level == pytest.approx(10.0)


def test_time_that_runs_backwards_takes_nothing_away() -> None:
    bucket = refill(empty_bucket(600.0, now_s=5.0), 5.5)
    assert refill(bucket, 4.0).level == pytest.approx(5.0)


def test_waiting_time_is_what_is_missing_over_the_rate() -> None:
    assert wait_for(empty_bucket(600.0, 0.0), 1.0) == pytest.approx(0.1)


def test_grants_stop_at_the_request_limit() -> None:
    state, answer = grant(limited(requests_per_minute=600.0), [ONE] * 8, now_s=0.5)
    assert answer.count == 5
    assert answer.wait_s == pytest.approx(0.1)
    assert state.requests is not None
    assert state.requests.level == pytest.approx(0.0)


def test_grants_stop_at_the_token_limit() -> None:
    # 60,000 tokens/min = 1,000/s: after 0.25 s there are 250, enough for two requests of 100.
    _, answer = grant(limited(tokens_per_minute=60_000.0), [ONE] * 5, now_s=0.25)
    assert answer.count == 2
    assert answer.wait_s == pytest.approx(0.05)


def test_a_request_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt() -> None:
    state = limited(tokens_per_minute=6_000.0)  # 100/s, capacity 100
    _, early = grant(state, [Cost(300.0, 0.0)], now_s=0.5)
    assert early.count == 0
    state, late = grant(state, [Cost(300.0, 0.0)], now_s=1.0)
    assert late.count == 1
    assert state.tokens is not None
    assert state.tokens.level == pytest.approx(-200.0)


def test_over_a_minute_the_limit_is_used_fully_and_never_exceeded() -> None:
    state, granted, now_s = limited(requests_per_minute=6_000.0), 0, 0.0
    while now_s < 60.0:
        state, answer = grant(state, [ONE] * 16, now_s)
        granted += answer.count
        now_s += max(answer.wait_s, 0.001)
    assert 0.98 * 6_000 <= granted <= 6_000


def test_a_pause_holds_everyone_and_is_never_shortened() -> None:
    state = pause(pause(limited(), until_s=30.0), until_s=10.0)
    assert grant(state, [ONE], now_s=20.0)[1].wait_s == pytest.approx(10.0)
    assert grant(state, [ONE], now_s=30.0)[1].count == 1


def test_the_budget_counts_what_is_in_flight() -> None:
    limiter = RateLimiter(None, None, 1.0, spent_usd=lambda: 0.4, clock=lambda: 0.0)
    cost = Cost(0.0, 0.25)
    answer = limiter.acquire([cost] * 5, NOTHING, NOTHING)
    assert (answer.count, answer.out_of_budget) == (2, True)
    # Both turn out cheaper: 0.1 instead of 0.25 each, so 0.6 - 0.2 = 0.4 are left, one more fits.
    answer = limiter.acquire([cost] * 5, Cost(0.0, 0.5), Cost(0.0, 0.2))
    assert (answer.count, answer.out_of_budget) == (1, True)


def test_settling_never_overfills_a_bucket() -> None:
    state = settle(limited(tokens_per_minute=6_000.0), Cost(1000.0, 0.0), Cost(10.0, 0.0))
    assert state.tokens is not None
    assert state.tokens.level == pytest.approx(100.0)


def test_a_limiter_without_limits_grants_everything() -> None:
    limiter = RateLimiter(None, None, None, spent_usd=lambda: 0.0, clock=lambda: 0.0)
    assert limiter.acquire([ONE] * 100, NOTHING, NOTHING).count == 100
    limiter.pause(3.0)
    assert limiter.acquire([ONE], NOTHING, NOTHING).wait_s == pytest.approx(3.0)
