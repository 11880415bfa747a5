"""Rate-limit headers, and what the limiter learns from them."""

from __future__ import annotations

import math

import pytest

from actors.rate_limiter import RateLimiter
from morlaif_ray.feedback.breaker import News
from morlaif_ray.feedback.headers import Allowance, RateHints, duration_s, read_hints
from morlaif_ray.feedback.rate import Cost, LimiterState, empty_bucket, grant, learn

pytestmark = pytest.mark.unit
ONE = Cost(100.0, 0.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1.0), ("12ms", 0.012), ("6m0s", 360.0), ("1h2m3.5s", 3723.5), ("7", 7.0)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "1x", "1s later", None])
def test_what_is_no_duration_counts_as_absent(text: str | None) -> None:
    assert duration_s(text) is None


def test_both_quantities_are_read_and_none_is_made_up() -> None:
    hints = read_hints(
        {
            "x-ratelimit-limit-requests": "6000",
            "x-ratelimit-remaining-requests": "5999",
            "x-ratelimit-reset-requests": "10ms",
            "x-ratelimit-remaining-tokens": "150",
        }
    )
    assert hints == RateHints(Allowance(6000.0, 5999.0, 0.01), Allowance(None, 150.0, None))
    assert read_hints({"content-type": "application/json"}) is None


def state(per_minute: float | None = None, **changes: float) -> LimiterState:
    bucket = empty_bucket(per_minute, 0.0) if per_minute else None
    return LimiterState(bucket, None, 0.0, math.inf, **changes)


def test_a_provider_s_limit_is_adopted_where_the_user_gave_none() -> None:
    learnt = learn(state(), RateHints(Allowance(600.0, 599.0, 0.1)), 0.0, burst_s=0.5)
    assert learnt.requests is not None
    assert learnt.requests.rate_per_s == 10.0
    assert learnt.requests.level == 5.0


def test_no_header_raises_the_rate_above_the_user_s_own() -> None:
    mine = state(600.0, most_requests_per_s=10.0)
    higher = learn(mine, RateHints(Allowance(6000.0, 5999.0, 0.1)), 0.0, 0.5)
    lower = learn(mine, RateHints(Allowance(300.0, 299.0, 0.1)), 0.0, 0.5)
    assert higher.requests is not None
    assert lower.requests is not None
    assert (higher.requests.rate_per_s, lower.requests.rate_per_s) == (10.0, 5.0)


def test_a_limit_per_day_is_not_taken_for_one_per_minute() -> None:
    assert learn(state(), RateHints(Allowance(200.0, 150.0, 21_600.0)), 0.0, 0.5).requests is None


def test_what_others_took_from_the_account_is_taken_from_the_bucket() -> None:
    full = state(600.0)  # 10 per second; after 1 s the bucket holds 10
    learnt = learn(full, RateHints(Allowance(600.0, 2.0, 1.0)), now_s=1.0, burst_s=1.0)
    _, answer = grant(learnt, [ONE] * 8, now_s=1.0)
    assert answer.count == 2


def test_permits_are_granted_ahead_at_their_times() -> None:
    ahead = state(600.0, lookahead_s=0.5)
    after, answer = grant(ahead, [ONE] * 20, now_s=0.0)
    assert answer.starts_s == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5))
    assert answer.wait_s == pytest.approx(0.35)
    assert grant(after, [ONE], now_s=0.1)[1].starts_s == pytest.approx((0.5,))


def test_the_limiter_takes_news_and_hints_in_one_call() -> None:
    limiter = RateLimiter(None, None, None, spent_usd=lambda: 0.0, clock=lambda: 0.0)
    limiter.report(News(1, 0, 0, ""), RateHints(Allowance(60.0, 0.0, 1.0)))
    answer = limiter.acquire([ONE] * 5, Cost(0.0, 0.0), Cost(0.0, 0.0))
    assert (answer.count, answer.wait_s) == (0, pytest.approx(0.75))
