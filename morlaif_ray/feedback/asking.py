"""The answering loop of one worker: look up what is paid, ask the rest, record, return numbers.

    PairBatch -> ledger.lookup -> [permits -> client.ask -> retry.decide -> parse -> ledger.append] -> BatchOutcome

Contract: every question of the batch ends in exactly one of recorded, answered, failed. An answer is in the ledger
before the outcome is returned, and at most FLUSH_AFTER_S after it arrived. Running a batch again asks nothing that was
recorded, so a batch may be re-sent after any crash. Nothing here knows Ray: ledger and limiter are Protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.client import AttemptError, FeedbackClient, Question
from morlaif_ray.feedback.ledger import FailureRow, LedgerRow, StoredAnswer
from morlaif_ray.feedback.parsing import parse_answer
from morlaif_ray.feedback.permits import Limiter, Permits
from morlaif_ray.feedback.prices import Price, estimate_tokens
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan
from morlaif_ray.feedback.rate import Cost
from morlaif_ray.feedback.retry import Abort, Retry, RetryPolicy, decide
from morlaif_ray.types import BoolArray, FloatArray, IntArray

FLUSH_ROWS = 1024
FLUSH_AFTER_S = 0.1
"""An answer waits at most this long before it is sent to the ledger."""
BREAKER_FAILURES = 50
"""So many questions failing in a row end the stage: the judge is down, not unlucky."""


class AnswerLedger(Protocol):
    """The ledger as a worker sees it."""

    async def lookup(self, keys: Sequence[bytes]) -> dict[bytes, StoredAnswer]: ...

    async def append(self, rows: Sequence[LedgerRow], failures: Sequence[FailureRow]) -> None: ...


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """All answers of one batch, N questions in plan order. Produced by workers, consumed by the driver."""

    index: int
    log_odds_N: FloatArray
    """For the response shown first, nats; NaN where unreadable or failed."""
    mass_N: FloatArray
    failed_N: BoolArray
    model_N: IntArray
    """Index into `models`."""
    models: tuple[str, ...]
    reasons: dict[int, str]
    """Question number -> why it is unreadable or failed."""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    num_recorded: int
    """Answers that were in the ledger before; the others were asked now."""

    @property
    def num_failed(self) -> int:
        return int(self.failed_N.sum())


class BatchRunner:
    """Answers batches with one client, `max_in_flight` requests at a time over all of them."""

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
    ) -> None:
        self._client = client
        self._plan = plan
        self._ledger = ledger
        self._policy = policy
        self._price = price
        self._max_in_flight = max_in_flight
        self._permits = Permits(limiter, self._beat) if limiter is not None else None
        self._in_flight = asyncio.Semaphore(max_in_flight)
        self._failures_in_row = 0
        self._stop: FeedbackError | None = None
        self.signs_of_life = 0
        """Grows with every attempt, answer and wait; a runner whose count stands still hangs."""
        self.done: dict[int, int] = {}
        """Batch index -> questions answered so far, for batches under way."""

    def _beat(self) -> None:
        self.signs_of_life += 1

    async def run(self, batch: PairBatch) -> BatchOutcome:
        """FeedbackError when nothing can go on (key refused, budget reached, judge down, ledger unusable)."""
        if self._stop is not None:
            raise self._stop
        questions = self._plan.batch_questions(batch)
        stored = await self._ledger.lookup([question.key for question in questions])
        record = _Record(batch, self._plan.per_pair, questions, stored, self._ledger)
        self.done[batch.index] = len(stored)
        try:
            missing = deque(
                number for number, entry in enumerate(questions) if entry.key not in stored
            )
            await self._drain_all(missing, record)
            await record.flush_all()
        finally:
            del self.done[batch.index]
        if self._stop is not None:
            raise self._stop
        return record.outcome()

    async def _drain_all(self, missing: deque[int], record: _Record) -> None:
        count = min(self._max_in_flight, len(missing))
        tasks = [asyncio.create_task(self._drain(missing, record)) for _ in range(count)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # after an unforeseen error the others must not go on paying unseen
                task.cancel()

    async def _drain(self, missing: deque[int], record: _Record) -> None:
        while missing and self._stop is None:
            async with self._in_flight:
                if not missing or self._stop is not None:
                    return
                try:
                    await self._answer(missing.popleft(), record)
                except FeedbackError as error:
                    # The others finish what they have in flight: it is paid for.
                    self._stop = error
                    return
            self.done[record.index] += 1

    async def _answer(self, number: int, record: _Record) -> None:
        """Asks one question until it is answered, given up, or hopeless (FeedbackError)."""
        question = record.questions[number]
        attempt = 0
        while True:
            attempt += 1
            cost = await self._permit(question)
            self.signs_of_life += 1
            started_s = time.perf_counter()
            try:
                raw = await self._client.ask(question)
            except AttemptError as error:
                self._settle(cost, Cost(0.0, 0.0))
                reason = await self._after_failure(error, attempt)
                if reason:
                    await record.add_failure(number, reason, attempt)
                    return
                continue
            self._failures_in_row = 0
            used_usd = self._price.cost_usd(raw.prompt_tokens, raw.completion_tokens)
            self._settle(cost, Cost(raw.prompt_tokens + raw.completion_tokens, used_usd))
            parsed = parse_answer(raw)
            row = LedgerRow(
                question.key,
                record.pair_of(number),
                question.principle,
                question.order,
                parsed.log_odds,
                parsed.mass,
                parsed.reason,
                json.dumps(raw.top_logprobs),
                raw.model,
                raw.prompt_tokens,
                raw.completion_tokens,
                used_usd,
                time.perf_counter() - started_s,
                attempt,
            )
            await record.add(row)
            return

    async def _permit(self, question: Question) -> Cost | None:
        if self._permits is None:
            return None
        tokens = estimate_tokens(question.prompt, question.first, question.second, question.phrase)
        cost = Cost(tokens + 1.0, self._price.cost_usd(tokens, 1.0))
        await self._permits.take(cost)
        return cost

    def _settle(self, estimated: Cost | None, actual: Cost) -> None:
        if self._permits is not None and estimated is not None:
            self._permits.settle(estimated, actual)

    async def _after_failure(self, error: AttemptError, attempt: int) -> str:
        """Waits and returns "" to try again, or the reason to give up. FeedbackError when all is hopeless."""
        step = decide(error, attempt, self._policy, random.random())
        if isinstance(step, Abort):
            raise FeedbackError(step.message)
        if isinstance(step, Retry):
            if step.everyone and self._permits is not None:
                await self._permits.pause(step.wait_s)
            await self._sleep(step.wait_s)
            return "" if self._stop is None else "stopped before an answer came"
        self._failures_in_row += 1
        if self._failures_in_row >= BREAKER_FAILURES:
            raise FeedbackError(
                f"the judge failed {BREAKER_FAILURES} questions in a row, last: {step.reason}; answers so far are "
                f"in the ledger, run the same command again when the judge is back"
            )
        return step.reason

    async def _sleep(self, seconds: float) -> None:
        """Sleeps in slices, so that a long Retry-After is not taken for a hang."""
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, 5.0))
            self.signs_of_life += 1


class _Record:
    """The answers of one batch on their way to ledger and outcome."""

    def __init__(
        self,
        batch: PairBatch,
        per_pair: int,
        questions: list[Question],
        stored: dict[bytes, StoredAnswer],
        ledger: AnswerLedger,
    ) -> None:
        self.index = batch.index
        self.questions = questions
        self._batch = batch
        self._per_pair = per_pair
        self._stored = stored
        self._num_recorded = len(stored)
        self._failed: dict[bytes, str] = {}
        self._ledger = ledger
        self._rows: list[LedgerRow] = []
        self._failure_rows: list[FailureRow] = []
        self._flushing: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def pair_of(self, number: int) -> str:
        return self._batch.pairs[number // self._per_pair].pair_id

    async def add(self, row: LedgerRow) -> None:
        self._rows.append(row)
        self._stored[row.key] = StoredAnswer(
            row.log_odds,
            row.mass,
            row.reason,
            row.model,
            row.prompt_tokens,
            row.completion_tokens,
            row.cost_usd,
        )
        await self._flush_soon()

    async def add_failure(self, number: int, reason: str, attempts: int) -> None:
        question = self.questions[number]
        self._failed[question.key] = reason
        self._failure_rows.append(
            FailureRow(
                question.key,
                self.pair_of(number),
                question.principle,
                question.order,
                reason,
                attempts,
            )
        )
        await self._flush_soon()

    async def _flush_soon(self) -> None:
        if len(self._rows) + len(self._failure_rows) >= FLUSH_ROWS:
            await (
                self._flush()
            )  # awaited here: a slow ledger slows the asking down instead of filling memory
        elif self._flushing is None or self._flushing.done():
            if self._flushing is not None:
                self._flushing.result()  # raises what the ledger said
            self._flushing = asyncio.create_task(self._flush_later())

    async def _flush_later(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), FLUSH_AFTER_S)
        await self._flush()

    async def _flush(self) -> None:
        rows, self._rows = self._rows, []
        failures, self._failure_rows = self._failure_rows, []
        if rows or failures:
            await self._ledger.append(rows, failures)

    async def flush_all(self) -> None:
        self._hurry.set()
        if self._flushing is not None:
            await self._flushing
        await self._flush()

    def outcome(self) -> BatchOutcome:
        count = len(self.questions)
        log_odds_N = np.full(count, np.nan)
        mass_N = np.zeros(count)
        failed_N = np.zeros(count, dtype=np.bool_)
        model_N = np.zeros(count, dtype=np.int64)
        models: dict[str, int] = {}
        reasons: dict[int, str] = {}
        prompt_tokens = completion_tokens = 0
        cost_usd = 0.0
        for number, question in enumerate(self.questions):
            answer = self._stored.get(question.key)
            if answer is None:
                failed_N[number] = True
                reasons[number] = self._failed.get(question.key, "not asked")
                model_N[number] = models.setdefault("", len(models))
                continue
            log_odds_N[number] = answer.log_odds
            mass_N[number] = answer.mass
            model_N[number] = models.setdefault(answer.model, len(models))
            if answer.reason:
                reasons[number] = answer.reason
            prompt_tokens += answer.prompt_tokens
            completion_tokens += answer.completion_tokens
            cost_usd += answer.cost_usd
        return BatchOutcome(
            self.index,
            log_odds_N,
            mass_N,
            failed_N,
            model_N,
            tuple(models),
            reasons,
            prompt_tokens,
            completion_tokens,
            cost_usd,
            self._num_recorded,
        )
