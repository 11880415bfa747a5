"""The circuit breaker with a clock of our own."""

from __future__ import annotations

import pytest

from actors.rate_limiter import RateLimiter
from morlaif_ray.feedback.breaker import (
    GIVE_UP_AFTER,
    OPEN_AFTER,
    Breaker,
    News,
    describe,
    hear,
    passage,
)
from morlaif_ray.feedback.rate import Cost

pytestmark = pytest.mark.unit
ONE, NOTHING = Cost(100.0, 0.0), Cost(0.0, 0.0)


def failed(count: int) -> News:
    return News(0, count, count, "server: HTTP 500")


def opened() -> Breaker:
    """Open from 0 s, first probe at 1 s."""
    return hear(Breaker(), failed(OPEN_AFTER), now_s=0.0)


def test_twenty_failures_in_a_row_over_all_workers_open_it() -> None:
    state = hear(hear(Breaker(), failed(12), 0.0), failed(7), 0.0)
    assert passage(state, 0.0)[1].most is None
    state = hear(state, failed(1), 0.0)
    assert passage(state, 0.25)[1] == passage(state, 0.25)[1]
    assert passage(state, 0.25)[1].most == 0
    assert passage(state, 0.25)[1].wait_s == pytest.approx(0.75)
    assert describe(state).startswith(
        "the provider failed 20 requests in a row (last: server: HTTP 500)"
    )


def test_a_success_among_the_failures_starts_the_count_anew() -> None:
    state = hear(Breaker(), failed(19), 0.0)
    state = hear(state, News(1, 30, 3, "x"), 0.0)
    assert state.failures == 3


def test_half_open_lets_exactly_one_probe_through_and_its_success_closes() -> None:
    state, first = passage(opened(), 1.0)
    assert first.most == 1
    state, second = passage(state, 1.1)
    assert second.most == 0
    state = hear(state, News(1, 0, 0, ""), 1.2)
    assert passage(state, 1.2)[1].most is None


def test_each_failed_probe_doubles_the_wait_and_the_tenth_gives_up() -> None:
    state, waits, now_s = opened(), [], 0.0
    while not state.gave_up:
        assert state.open_until_s is not None
        now_s = state.open_until_s
        state, _ = passage(state, now_s)
        state = hear(state, failed(1), now_s)
        assert state.open_until_s is not None
        waits.append(state.open_until_s - now_s)
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0, 60.0]
    assert len(waits) == GIVE_UP_AFTER


def test_failures_of_requests_that_were_in_flight_when_it_opened_say_nothing_new() -> None:
    state = hear(opened(), failed(40), 0.5)
    assert (state.probes_failed, state.open_until_s) == (0, 1.0)


def test_a_probe_that_vanished_with_its_worker_is_sent_anew() -> None:
    state, _ = passage(opened(), 1.0)
    assert passage(state, 45.9)[1].most == 0
    assert passage(state, 46.1)[1].most == 1


def test_the_limiter_grants_nothing_while_open_and_says_why_when_it_gives_up() -> None:
    now = [0.0]
    limiter = RateLimiter(None, None, None, spent_usd=lambda: 0.0, clock=lambda: now[0])
    limiter.report(failed(OPEN_AFTER))
    assert limiter.acquire([ONE] * 3, NOTHING, NOTHING).count == 0
    assert "failed 20 requests in a row" in limiter.condition()
    for _ in range(GIVE_UP_AFTER):
        now[0] += 61.0
        assert limiter.acquire([ONE] * 3, NOTHING, NOTHING).count == 1
        limiter.report(failed(1))
    answer = limiter.acquire([ONE], NOTHING, NOTHING)
    assert answer.given_up.startswith(
        "the provider has been failing for minutes: 30 requests in a row"
    )
