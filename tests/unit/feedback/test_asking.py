"""The answering loop without Ray: every question ends recorded, answered or failed, and is paid once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest

from actors.rate_limiter import RateLimiter
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.breaker import News
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.headers import RateHints
from morlaif_ray.feedback.permits import BudgetReachedError
from morlaif_ray.feedback.prices import Price
from morlaif_ray.feedback.rate import Cost, Grant
from tests.unit.feedback.fakes import (
    PLAN,
    FakeJudge,
    MemoryLedger,
    batch_of,
    failing,
    make_runner,
    words_difference,
)

pytestmark = pytest.mark.unit


class LocalLimiter:
    """The real limiter behind the Protocol, without Ray."""

    def __init__(self, limiter: RateLimiter) -> None:
        self._limiter = limiter
        self.pauses: list[float] = []

    async def acquire(self, wanted: Sequence[Cost], estimated: Cost, actual: Cost) -> Grant:
        return self._limiter.acquire(wanted, estimated, actual)

    async def pause(self, wait_s: float) -> None:
        self.pauses.append(wait_s)
        self._limiter.pause(wait_s)

    async def report(self, news: News, hints: RateHints | None) -> None:
        self._limiter.report(news, hints)


def test_every_question_is_asked_once_and_recorded() -> None:
    judge, ledger = FakeJudge(), MemoryLedger()
    outcome = asyncio.run(make_runner(judge, ledger).run(batch_of(3)))
    assert len(judge.asked) == len(ledger.rows) == 3 * 4
    expected = [words_difference(question) + 0.5 for question in PLAN.batch_questions(batch_of(3))]
    assert outcome.log_odds_N.tolist() == pytest.approx(expected)
    assert (outcome.num_failed, outcome.num_recorded, outcome.models) == (0, 0, ("fake-1",))
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (1200, 12)


def test_a_second_run_asks_nothing_and_answers_the_same() -> None:
    ledger = MemoryLedger()
    first = asyncio.run(make_runner(FakeJudge(), ledger).run(batch_of(3)))
    judge = FakeJudge()
    second = asyncio.run(make_runner(judge, ledger).run(batch_of(3)))
    assert judge.asked == []
    assert second.num_recorded == 12
    assert second.log_odds_N.tolist() == first.log_odds_N.tolist()
    assert second.prompt_tokens == first.prompt_tokens


def test_a_run_that_died_midway_asks_only_what_is_missing() -> None:
    ledger = MemoryLedger()

    def die(question: Question) -> None:
        if question.prompt.startswith("\n\nHuman: question 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(make_runner(FakeJudge(die), ledger, max_in_flight=1).run(batch_of(5)))
    recorded = len(ledger.rows)
    judge = FakeJudge()
    outcome = asyncio.run(make_runner(judge, ledger).run(batch_of(5)))
    assert len(judge.asked) == 20 - recorded
    assert outcome.num_recorded == recorded
    assert not any(math.isnan(value) for value in outcome.log_odds_N)


def test_transient_errors_are_retried_until_answered() -> None:
    ledger = MemoryLedger()
    judge = FakeJudge(failing(2, AttemptError("server", "HTTP 500")))
    outcome = asyncio.run(make_runner(judge, ledger, max_attempts=3).run(batch_of(2)))
    assert outcome.num_failed == 0
    assert {row.attempts for row in ledger.rows.values()} == {3}


def test_a_question_that_keeps_failing_is_failed_with_its_reason_and_not_recorded_as_answer() -> (
    None
):
    ledger = MemoryLedger()
    judge = FakeJudge(failing(99, AttemptError("timeout", "no answer within 1 s")))
    outcome = asyncio.run(make_runner(judge, ledger, max_attempts=2).run(batch_of(1)))
    assert outcome.num_failed == 4
    assert ledger.rows == {}
    assert {row.error for row in ledger.failures.values()} == {
        "timeout: no answer within 1 s (after 2 attempts)"
    }
    assert all(math.isnan(value) for value in outcome.log_odds_N)


def test_a_refused_key_stops_at_once_without_a_retry_storm() -> None:
    judge = FakeJudge(failing(99, AttemptError("auth", "key refused")))
    with pytest.raises(FeedbackError, match=r"^key refused$"):
        asyncio.run(make_runner(judge, MemoryLedger(), max_in_flight=4).run(batch_of(50)))
    assert len(judge.asked) <= 4


def test_a_judge_that_is_down_ends_the_stage_after_fifty_questions() -> None:
    judge = FakeJudge(failing(99, AttemptError("server", "HTTP 500")))
    runner = make_runner(judge, MemoryLedger(), max_in_flight=1, max_attempts=1)
    with pytest.raises(FeedbackError, match="failed 50 questions in a row, last: server: HTTP 500"):
        asyncio.run(runner.run(batch_of(50)))
    assert len(judge.asked) == 50


def test_no_more_than_max_in_flight_requests_run_at_once() -> None:
    running = peak = 0

    class Slow(FakeJudge):
        async def ask(self, question: Question):  # type: ignore[no-untyped-def]
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            await asyncio.sleep(0.001)
            running -= 1
            return await super().ask(question)

    async def two_batches() -> None:
        runner = make_runner(Slow(), MemoryLedger(), max_in_flight=3)
        second = batch_of(5)
        await asyncio.gather(runner.run(batch_of(5)), runner.run(type(second)(1, second.pairs)))

    asyncio.run(two_batches())
    assert peak == 3


def test_the_budget_is_a_hard_stop_that_counts_requests_in_flight() -> None:
    # 101 tokens at 10 $/M = 0.00101 $ each; the estimate before sending is higher, so at most that many go out.
    price = Price(10.0, 10.0)
    ledger = MemoryLedger()
    limiter = LocalLimiter(RateLimiter(None, None, 0.010, spent_usd=lambda: 0.0))
    judge = FakeJudge()
    with pytest.raises(BudgetReachedError, match="budget_usd is reached"):
        asyncio.run(make_runner(judge, ledger, limiter=limiter, price=price).run(batch_of(20)))
    spent = sum(row.cost_usd for row in ledger.rows.values())
    assert len(ledger.rows) == len(
        judge.asked
    )  # what was in flight when the budget ended is recorded
    assert 0.006 < spent <= 0.010


def test_retry_after_holds_back_the_whole_cluster() -> None:
    limiter = LocalLimiter(RateLimiter(60_000.0, None, None, spent_usd=lambda: 0.0))
    judge = FakeJudge(failing(1, AttemptError("rate_limit", "HTTP 429", retry_after_s=0.01)))
    outcome = asyncio.run(make_runner(judge, MemoryLedger(), limiter=limiter).run(batch_of(1)))
    assert outcome.num_failed == 0
    assert len(limiter.pauses) >= 1
    assert min(limiter.pauses) >= 0.01


def test_an_error_of_the_ledger_ends_the_batch() -> None:
    class Full(MemoryLedger):
        async def append(self, rows: object, failures: object, settled: object) -> None:
            raise FeedbackError("disk full")

    with pytest.raises(FeedbackError, match="disk full"):
        asyncio.run(make_runner(FakeJudge(), Full()).run(batch_of(2)))


def test_pairs_that_the_judge_refuses_fail_alone_however_many_questions_they_have() -> None:
    def before(question: Question) -> None:
        if int(question.prompt.split()[2]) < 30:  # "Human: question 7"
            raise AttemptError("bad_request", "HTTP 400: too long")

    rate = RateLimiter(None, None, None, spent_usd=lambda: 0.0)
    limiter = LocalLimiter(rate)
    judge, ledger = FakeJudge(before), MemoryLedger()
    outcome = asyncio.run(make_runner(judge, ledger, limiter=limiter).run(batch_of(40)))
    assert (outcome.num_failed, len(ledger.rows)) == (
        120,
        40,
    )  # 30 and 10 pairs, four questions each
    assert len(judge.asked) == 160  # none was asked twice
    assert rate.condition() == ""
    assert {failure.error for failure in ledger.failures.values()} == {
        "bad_request: HTTP 400: too long"
    }


def test_a_judge_that_refuses_every_pair_ends_the_run_in_one_line() -> None:
    judge = FakeJudge(failing(1, AttemptError("bad_request", "HTTP 400: unknown parameter")))
    with pytest.raises(
        FeedbackError, match=r"refused the questions on 50 prompts in a row.*unknown"
    ):
        asyncio.run(make_runner(judge, MemoryLedger()).run(batch_of(80)))
    assert (
        197 <= len(judge.asked) <= 220
    )  # 49 pairs of four questions, the next, and what was in flight


def test_an_answer_that_comes_while_the_ledger_writes_does_not_wait_for_the_next_one() -> None:
    writes, goes_on = asyncio.Event(), asyncio.Event()

    class Slow(MemoryLedger):
        async def append(self, *arguments: Any) -> None:
            writes.set()
            await goes_on.wait()
            await super().append(*arguments)

    class Held(FakeJudge):
        async def ask(self, question: Question) -> RawAnswer:
            answer = await super().ask(question)
            if len(self.asked) == 2:  # comes while the first is being written
                await writes.wait()
            if len(self.asked) == 3:  # and this one only when both are on the disk
                goes_on.set()
                async with asyncio.timeout(10.0):
                    while len(ledger.rows) < 2:
                        await asyncio.sleep(0.01)
            return answer

    ledger = Slow()
    outcome = asyncio.run(make_runner(Held(), ledger, max_in_flight=1).run(batch_of(1)))
    assert outcome.num_failed == 0
    assert len(ledger.rows) == 4
