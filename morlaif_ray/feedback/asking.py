"""The answering loop of one worker: look up what is paid, ask the rest, record, return numbers.

    PairBatch -> ledger.lookup -> [permit -> gate -> client.ask -> retry.decide -> parse -> record] -> BatchOutcome

Contract: every question of the batch ends in exactly one of recorded, answered, failed. An answer is in the ledger
before the outcome is returned, and at most FLUSH_AFTER_S after it arrived. Running a batch again asks nothing that was
recorded, so a batch may be re-sent after any crash. Nothing here knows Ray: ledger and limiter are Protocols.

A permit (rate, budget, breaker) is taken before the gate (requests in flight), so permits are fetched for many
questions at a time while the gate is busy.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.client import (
    AsksMany,
    AttemptError,
    FeedbackClient,
    Question,
    RawAnswer,
)
from morlaif_ray.feedback.concurrency import Gate, start_concurrency
from morlaif_ray.feedback.headers import ReportsLimits
from morlaif_ray.feedback.intents import Announcer
from morlaif_ray.feedback.joint import answers_for, joint_question
from morlaif_ray.feedback.permits import Limiter, Permits
from morlaif_ray.feedback.prices import Price, estimate_tokens
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan
from morlaif_ray.feedback.rate import Cost
from morlaif_ray.feedback.recording import AnswerLedger, BatchOutcome, BatchRecord, answer_row
from morlaif_ray.feedback.retry import Abort, Retry, RetryPolicy, decide
from morlaif_ray.seeding import stable_hash

__all__ = ["BREAKER_FAILURES", "AnswerLedger", "BatchOutcome", "BatchRunner"]

BREAKER_FAILURES = 50
"""So many questions given up in a row end the stage: the judge is down, not unlucky."""
TASKS_PER_REQUEST = 2
"""Questions being handled per request in flight: the second one waits for its permit meanwhile."""
BEAT_S, CALL_PATIENCE_S = 5.0, 3600.0
"""A call of many questions gives a sign of life so often, for so long."""
NOTHING = Cost(0.0, 0.0)


class BatchRunner:
    """Answers batches with one client, at most `max_in_flight` requests at a time over all of them."""

    def __init__(
        self,
        client: FeedbackClient,
        plan: QuestionPlan,
        ledger: AnswerLedger,
        *,
        policy: RetryPolicy,
        price: Price,
        max_in_flight: int,
        limiter: Limiter | None = None,
        answer_tokens: Callable[[Question], float] = lambda _: 1.0,
        head_tokens: float = 0.0,
    ) -> None:
        self._client = client
        self._limits = client if isinstance(client, ReportsLimits) else None
        self._plan = plan
        self._ledger = ledger
        self._policy = policy
        self._price = price
        self._max_in_flight = max_in_flight
        self._answer_tokens = answer_tokens  # the most that an answer may have
        self._head_tokens = head_tokens  # of system prompt and examples, in every request
        self._permits = Permits(limiter, self._beat) if limiter is not None else None
        # What costs nothing need not be accounted for.
        self._announcer = Announcer(ledger) if price.cost_usd(1.0, 1.0) > 0.0 else None
        self._gate = Gate(start_concurrency(max_in_flight))
        self._streak = _Streak()
        self._stop: FeedbackError | None = None
        self.signs_of_life = 0
        """Grows with every attempt, answer and wait; a runner whose count stands still hangs."""
        self.done: dict[int, int] = {}
        """Batch index -> questions answered so far, for batches under way."""
        self.last_error = ""
        """The last failed attempt in words, retried or not."""

    def _beat(self) -> None:
        self.signs_of_life += 1

    def stop(self) -> None:
        """Starts no further request; what is in flight ends and is recorded, then `run` raises."""
        self._stop = self._stop or FeedbackError("stopped")
        if self._permits is not None:
            self._permits.refuse(self._stop)

    async def run(self, batch: PairBatch) -> BatchOutcome:
        """FeedbackError when nothing can go on (key refused, budget reached, judge down, ledger unusable)."""
        if self._stop is not None:
            raise self._stop
        questions = self._plan.batch_questions(batch)
        stored = await self._ledger.lookup([question.key for question in questions])
        record = BatchRecord(batch, self._plan.per_pair, questions, stored, self._ledger)
        self.done[batch.index] = len(stored)
        try:
            missing = deque(self._plan.requests(questions, stored))
            if isinstance(self._client, AsksMany):
                await self._drain_calls(self._client, missing, record)
            else:
                await self._drain_all(missing, record)
            await record.flush_all()
        finally:
            del self.done[batch.index]
        if self._stop is not None:
            raise self._stop
        return record.outcome()

    async def _drain_all(self, missing: deque[tuple[int, ...]], record: BatchRecord) -> None:
        count = min(TASKS_PER_REQUEST * self._max_in_flight, len(missing))
        tasks = [asyncio.create_task(self._drain(missing, record)) for _ in range(count)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # after an unforeseen error the others must not go on paying unseen
                task.cancel()

    async def _drain(self, missing: deque[tuple[int, ...]], record: BatchRecord) -> None:
        while missing and self._stop is None:
            numbers = missing.popleft()
            try:
                await self._answer(numbers, record)
            except FeedbackError as error:
                # The others finish what they have in flight: it is paid for.
                self._stop = self._stop or error
                return
            self.done[record.index] += len(numbers)

    async def _drain_calls(
        self, client: AsksMany, missing: deque[tuple[int, ...]], record: BatchRecord
    ) -> None:
        """Call by call, for a judge that answers many questions at once. A call ends between two groups that share
        their prompt, and what it could not answer is not asked again: nothing about it is transient."""
        while missing and self._stop is None:
            numbers = _next_call(missing, record.questions, client.questions_per_call)
            questions = [record.questions[number] for number in numbers]
            try:
                costs = [await self._permit(question) for question in questions]
                self.signs_of_life += 1
                started_s = time.perf_counter()
                answers = await _patiently(client.ask_many(questions), self._beat)
            except FeedbackError as error:
                self._stop = self._stop or error
                return
            latency_s = time.perf_counter() - started_s
            for number, cost, answer in zip(numbers, costs, answers, strict=True):
                if isinstance(answer, AttemptError):
                    self._note_failure(answer, cost)
                    await record.add_failure(number, str(answer), 1)
                else:
                    await self._record((number,), record, answer, cost, latency_s, 1)
            self.done[record.index] += len(numbers)

    async def _answer(self, numbers: tuple[int, ...], record: BatchRecord) -> None:
        """Asks one request until it is answered, given up, or hopeless (FeedbackError).

        `numbers` are the questions that it answers: one, or in joint mode several.
        """
        question = joint_question([record.questions[number] for number in numbers])
        attempt = 0
        while True:
            attempt += 1
            # Announced first: a request whose time has come must not wait for a disk, or many would start at once.
            ticket = await self._announce(numbers, record, question)
            try:
                cost = await self._permit(question)
            except FeedbackError:
                record.settle(ticket)
                raise
            async with self._gate:
                if self._stop is not None:
                    self._settle(cost, NOTHING)
                    record.settle(ticket)
                    return
                self.signs_of_life += 1
                started_s = time.perf_counter()
                try:
                    raw = await self._client.ask(question)
                except AttemptError as error:
                    failure = error
                else:
                    latency_s = time.perf_counter() - started_s
                    self._after_success()
                    record.settle(ticket)
                    await self._record(numbers, record, raw, cost, latency_s, attempt)
                    return
                record.settle(ticket, failure.doubt)
                self._note_failure(failure, cost)
            reason = await self._after_failure(failure, attempt, question.prompt)
            if reason:
                for number in numbers:
                    if not record.has(number):
                        await record.add_failure(number, reason, attempt)
                return

    async def _record(
        self,
        numbers: tuple[int, ...],
        record: BatchRecord,
        raw: RawAnswer,
        cost: Cost | None,
        latency_s: float,
        attempt: int,
    ) -> None:
        bill = self._price.bill(raw.prompt_tokens, raw.completion_tokens, raw.cached_tokens)
        self._settle(cost, Cost(raw.prompt_tokens + raw.completion_tokens, bill.usd))
        missing = [number for number in numbers if not record.has(number)]
        answers = answers_for(raw, [number in missing for number in numbers])
        for number, answer in zip(missing, answers, strict=True):
            question, pair_id = record.questions[number], record.pair_of(number)
            await record.add(answer_row(question, pair_id, answer, self._price, latency_s, attempt))

    async def _announce(
        self, numbers: tuple[int, ...], record: BatchRecord, question: Question
    ) -> int | None:
        if self._announcer is None:
            return None
        key = record.questions[numbers[0]].key
        return await self._announcer.announce(key, self._estimate(question).usd)

    def _estimate(self, question: Question) -> Cost:
        tokens = self._head_tokens + estimate_tokens(
            question.prompt, question.first, question.second, question.phrase
        )
        answer = self._answer_tokens(question)
        return Cost(tokens + answer, self._price.cost_usd(tokens, answer))

    async def _permit(self, question: Question) -> Cost | None:
        if self._permits is None:
            return None
        cost = self._estimate(question)
        await self._permits.take(cost)
        return cost

    def _settle(self, estimated: Cost | None, actual: Cost) -> None:
        if self._permits is not None and estimated is not None:
            self._permits.settle(estimated, actual)

    def _after_success(self) -> None:
        self._streak = _Streak()
        self._gate.succeeded()
        if self._permits is not None:
            self._permits.succeeded()
            self._tell_limits()

    def _note_failure(self, error: AttemptError, cost: Cost | None) -> None:
        """What an attempt that failed means for concurrency, breaker and budget."""
        self.last_error = str(error)
        self._settle(cost, cost if error.doubt and cost is not None else NOTHING)
        if error.kind in ("rate_limit", "timeout"):
            self._gate.overloaded(time.monotonic())
        if self._permits is None:
            return
        if error.kind in ("server", "timeout", "connection", "malformed"):
            self._permits.failed(str(error))
        elif error.kind == "rate_limit":
            self._tell_limits()

    def _tell_limits(self) -> None:
        hints = self._limits.limits() if self._limits is not None else None
        if hints is not None and self._permits is not None:
            self._permits.learn(hints)

    async def _after_failure(self, error: AttemptError, attempt: int, prompt: str) -> str:
        """Waits and returns "" to try again, or the reason to give up. FeedbackError when all is hopeless."""
        step = decide(error, attempt, self._policy, random.random())
        if isinstance(step, Abort):
            raise FeedbackError(step.message)
        if isinstance(step, Retry):
            if step.everyone and self._permits is not None:
                await self._permits.pause(step.wait_s)
            await self._sleep(step.wait_s)
            return "" if self._stop is None else "stopped before an answer came"
        self._streak.gave_up(error, step.reason, prompt)
        return step.reason

    async def _sleep(self, seconds: float) -> None:
        """Sleeps in slices, so that a long Retry-After is not taken for a hang and a stop is heard."""
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0 and self._stop is None:
            await asyncio.sleep(min(left_s, 1.0))
            self.signs_of_life += 1


class _Streak:
    """Questions given up since the last answer: when they mean that nothing can go on."""

    def __init__(self) -> None:
        self._failures = 0
        self._refused: set[str] = set()

    def gave_up(self, error: AttemptError, reason: str, prompt: str) -> None:
        """FeedbackError at BREAKER_FAILURES questions, or at so many different prompts where the judge refused them.

        A pair that the judge refuses (too long, say) tells nothing of the next pair.
        """
        if error.kind == "bad_request":
            self._refused.add(stable_hash(prompt))
            if len(self._refused) >= BREAKER_FAILURES:
                raise FeedbackError(
                    f"the judge refused the questions on {BREAKER_FAILURES} prompts in a row, last: {reason}; correct "
                    f"the judge's options, or set feedback.max_prompt_tokens where it says that they are too long"
                )
            return
        self._failures += 1
        if self._failures >= BREAKER_FAILURES:
            raise FeedbackError(
                f"the judge failed {BREAKER_FAILURES} questions in a row, last: {reason}; answers so far are "
                f"in the ledger, run the same command again when the judge is back"
            )


async def _patiently(
    call: Coroutine[Any, Any, list[RawAnswer | AttemptError]], beat: Callable[[], None]
) -> list[RawAnswer | AttemptError]:
    """A call that computes for minutes (a large model on a CPU) is not a hang; one of an hour is."""
    task = asyncio.create_task(call)
    started_s = time.monotonic()
    while not task.done():
        await asyncio.wait({task}, timeout=BEAT_S)
        if time.monotonic() - started_s < CALL_PATIENCE_S:
            beat()
    return task.result()


def _next_call(
    missing: deque[tuple[int, ...]], questions: Sequence[Question], size: int
) -> list[int]:
    """Takes `size` questions off the front, and those that share the last one's prompt."""
    taken: list[int] = []
    while missing:
        if len(taken) >= size:
            last, following = questions[taken[-1]], questions[missing[0][0]]
            if (last.prompt, last.first, last.second) != (
                following.prompt,
                following.first,
                following.second,
            ):
                break
        taken += missing.popleft()
    return taken
