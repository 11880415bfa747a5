"""The answers of one batch on their way from the judge to the ledger and to the driver.

    BatchRecord.add(row) -> AnswerLedger.append (in groups) ... -> outcome() -> BatchOutcome

An answer waits at most FLUSH_AFTER_S before it is sent to the ledger; an outcome holds columns, no objects per answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from morlaif_ray.feedback.client import Question, RawAnswer
from morlaif_ray.feedback.intents import Intent, Settled
from morlaif_ray.feedback.ledger import FailureRow, LedgerRow, StoredAnswer
from morlaif_ray.feedback.parsing import parse_answer
from morlaif_ray.feedback.prices import Price
from morlaif_ray.feedback.questions import PairBatch
from morlaif_ray.types import BoolArray, FloatArray

FLUSH_ROWS = 1024
FLUSH_AFTER_S = 0.1
"""An answer waits at most this long before it is sent to the ledger."""


class AnswerLedger(Protocol):
    """The ledger as a worker sees it."""

    async def lookup(self, keys: Sequence[bytes]) -> dict[bytes, StoredAnswer]: ...

    async def announce(self, intents: Sequence[Intent]) -> None: ...

    async def append(
        self,
        rows: Sequence[LedgerRow],
        failures: Sequence[FailureRow],
        settled: Sequence[Settled],
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """All answers of one batch, N questions in plan order. Produced by workers, consumed by the driver."""

    index: int
    log_odds_N: FloatArray
    """For the response shown first, nats; NaN where unreadable or failed."""
    mass_N: FloatArray
    failed_N: BoolArray
    model_N: npt.NDArray[np.int16]
    """Index into `models`."""
    models: tuple[str, ...]
    reasons: dict[int, str]
    """Question number -> why it is unreadable or failed."""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    num_recorded: int
    """Answers that were in the ledger before; the others were asked now."""
    cached_tokens: int = 0
    """Prompt tokens that the provider served from its prefix cache."""
    cache_discount_usd: float = 0.0
    """Taken off the list price already in `cost_usd`, as is the next."""
    batch_discount_usd: float = 0.0

    @property
    def num_failed(self) -> int:
        return int(self.failed_N.sum())


class BatchRecord:
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
        self._settled: list[Settled] = []
        self._flushing: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def has(self, number: int) -> bool:
        """Whether this question's answer is recorded, or on its way there."""
        return self.questions[number].key in self._stored

    def pair_of(self, number: int) -> str:
        return self._batch.pairs[number // self._per_pair].pair_id

    def settle(self, ticket: int | None, doubt: str = "") -> None:
        """Notes that an announced request has ended; goes to the ledger with the next rows, in one transaction."""
        if ticket is not None:
            self._settled.append(Settled(ticket, doubt))

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
            row.cached_tokens,
            row.cache_discount_usd,
            row.batch_discount_usd,
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
        while self._rows or self._failure_rows:  # again, for what came while the ledger wrote
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), FLUSH_AFTER_S)
            await self._flush()

    async def _flush(self) -> None:
        rows, self._rows = self._rows, []
        failures, self._failure_rows = self._failure_rows, []
        settled, self._settled = self._settled, []
        if rows or failures or settled:
            await self._ledger.append(rows, failures, settled)

    async def flush_all(self) -> None:
        self._hurry.set()
        if self._flushing is not None:
            await self._flushing
        await self._flush()

    def outcome(self) -> BatchOutcome:
        return outcome_of(
            self.index, self.questions, self._stored, self._failed, self._num_recorded
        )


def answer_row(
    question: Question,
    pair_id: str,
    answer: RawAnswer,
    price: Price,
    latency_s: float,
    attempts: int,
) -> LedgerRow:
    """One answer as the ledger keeps it, whichever judge gave it and however it was asked."""
    bill = price.bill(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens)
    parsed = parse_answer(answer)
    return LedgerRow(
        question.key,
        pair_id,
        question.principle,
        question.order,
        parsed.log_odds,
        parsed.mass,
        parsed.reason,
        json.dumps(answer.top_logprobs),
        answer.model,
        answer.prompt_tokens,
        answer.completion_tokens,
        bill.usd,
        latency_s,
        attempts,
        answer.cached_tokens,
        bill.cache_discount_usd,
        bill.batch_discount_usd,
    )


def outcome_of(
    index: int,
    questions: Sequence[Question],
    stored: Mapping[bytes, StoredAnswer],
    failed: Mapping[bytes, str],
    num_recorded: int,
) -> BatchOutcome:
    """The answers of one batch as columns; a question neither stored nor failed counts as failed ("not asked")."""
    count = len(questions)
    log_odds_N = np.full(count, np.nan)
    mass_N = np.zeros(count)
    failed_N = np.zeros(count, dtype=np.bool_)
    model_N = np.zeros(count, dtype=np.int16)
    models: dict[str, int] = {}
    reasons: dict[int, str] = {}
    totals = [0, 0, 0.0, 0, 0.0, 0.0]
    for number, question in enumerate(questions):
        answer = stored.get(question.key)
        if answer is None:
            failed_N[number] = True
            reasons[number] = failed.get(question.key, "not asked")
            model_N[number] = models.setdefault("", len(models))
            continue
        log_odds_N[number] = answer.log_odds
        mass_N[number] = answer.mass
        model_N[number] = models.setdefault(answer.model, len(models))
        if answer.reason:
            reasons[number] = answer.reason
        totals = [total + amount for total, amount in zip(totals, answer[4:], strict=True)]
    return BatchOutcome(
        index,
        log_odds_N,
        mass_N,
        failed_N,
        model_N,
        tuple(models),
        reasons,
        int(totals[0]),
        int(totals[1]),
        totals[2],
        num_recorded,
        int(totals[3]),
        totals[4],
        totals[5],
    )
