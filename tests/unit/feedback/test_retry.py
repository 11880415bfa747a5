"""The retry decision and Retry-After, as functions of values."""

from __future__ import annotations

import pytest

from morlaif_ray.feedback.client import AttemptError
from morlaif_ray.feedback.openai_client import retry_after_s
from morlaif_ray.feedback.retry import Abort, GiveUp, Retry, RetryPolicy, decide

pytestmark = pytest.mark.unit
POLICY = RetryPolicy(max_attempts=4, base_wait_s=0.5, max_wait_s=3.0)


@pytest.mark.parametrize(("attempt", "wait_s"), [(1, 0.5), (2, 1.0), (3, 2.0)])
def test_waits_double_with_each_attempt(attempt: int, wait_s: float) -> None:
    step = decide(AttemptError("server", "HTTP 500"), attempt, POLICY, jitter=1.0)
    assert step == Retry(wait_s)


def test_jitter_spreads_a_wait_between_half_and_full() -> None:
    assert decide(AttemptError("timeout", "x"), 2, POLICY, jitter=0.0) == Retry(0.5)


def test_a_wait_is_capped() -> None:
    policy = RetryPolicy(max_attempts=20, base_wait_s=0.5, max_wait_s=3.0)
    assert decide(AttemptError("connection", "x"), 15, policy, jitter=1.0) == Retry(3.0)


def test_retry_after_is_a_lower_bound_and_holds_everyone_back() -> None:
    step = decide(AttemptError("rate_limit", "HTTP 429", retry_after_s=20.0), 1, POLICY, jitter=1.0)
    assert step == Retry(20.0 + 0.05, everyone=True)


def test_a_bare_429_waits_alone() -> None:
    step = decide(AttemptError("rate_limit", "HTTP 429"), 1, POLICY, jitter=1.0)
    assert step == Retry(0.5, everyone=False)


def test_the_last_attempt_gives_up_and_counts() -> None:
    step = decide(AttemptError("server", "HTTP 500"), 4, POLICY, jitter=0.5)
    assert step == GiveUp("server: HTTP 500 (after 4 attempts)")


def test_a_bad_request_is_not_repeated() -> None:
    assert decide(AttemptError("bad_request", "too long"), 1, POLICY, 0.5) == GiveUp(
        "bad_request: too long"
    )


@pytest.mark.parametrize("kind", ["auth", "not_found", "quota"])
def test_what_no_retry_can_mend_ends_everything_at_once(kind: str) -> None:
    step = decide(AttemptError(kind, "key refused"), 1, POLICY, 0.5)  # type: ignore[arg-type]
    assert step == Abort("key refused")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_header_in_all_its_forms(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert retry_after_s(headers, now_s=60.0) == seconds
