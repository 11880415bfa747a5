"""Shared by the feedback tests: pairs, a plan, a ledger and a limiter in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from morlaif_ray.feedback.asking import BatchRunner
from morlaif_ray.feedback.client import AttemptError, FeedbackClient, Question, RawAnswer
from morlaif_ray.feedback.intents import Intent, Settled
from morlaif_ray.feedback.ledger import FailureRow, LedgerRow, StoredAnswer
from morlaif_ray.feedback.permits import Limiter
from morlaif_ray.feedback.prices import FREE, Price
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan
from morlaif_ray.feedback.retry import RetryPolicy
from morlaif_ray.feedback.rules_client import top_logprobs
from morlaif_ray.types import ResponsePair


def make_pairs(count: int) -> list[ResponsePair]:
    """Pair i: response_a has i + 1 words, response_b two; label 1 where a is longer."""
    return [
        ResponsePair(
            pair_id=f"pair{i}",
            prompt_id=f"prompt{i}",
            prompt=f"\n\nHuman: question {i}\n\nAssistant:",
            response_a=" word" * (i + 1),
            response_b=" two words",
            split="test",
            human_label=float(i + 1 > 2),
        )
        for i in range(count)
    ]


PLAN = QuestionPlan((("detail", "More detail?"), ("general", "Better?")), "both", 0, "recipe")


def words_difference(question: Question) -> float:
    """The fake judges' opinion: nats for the response shown first."""
    return float(len(question.first.split()) - len(question.second.split()))


class FakeJudge:
    """Answers `words_difference` plus a position bias of 0.5; `before` may raise or count."""

    def __init__(self, before: Callable[[Question], None] = lambda _: None) -> None:
        self._before = before
        self.asked: list[Question] = []

    async def ask(self, question: Question) -> RawAnswer:
        self.asked.append(question)
        self._before(question)
        return RawAnswer(top_logprobs(words_difference(question) + 0.5), "fake-1", 100, 1)

    async def close(self) -> None:
        return None


class MemoryLedger:
    def __init__(self) -> None:
        self.rows: dict[bytes, LedgerRow] = {}
        self.failures: dict[bytes, FailureRow] = {}
        self.open: dict[int, Intent] = {}
        self.doubts: list[tuple[Intent, str]] = []
        self.num_announcements = 0

    async def lookup(self, keys: Sequence[bytes]) -> dict[bytes, StoredAnswer]:
        found = {key: self.rows[key] for key in keys if key in self.rows}
        return {
            key: StoredAnswer(
                row.log_odds,
                row.mass,
                row.reason,
                row.model,
                row.prompt_tokens,
                row.completion_tokens,
                row.cost_usd,
            )
            for key, row in found.items()
        }

    async def announce(self, intents: Sequence[Intent]) -> None:
        self.open |= {intent.ticket: intent for intent in intents}
        self.num_announcements += len(intents)

    async def append(
        self,
        rows: Sequence[LedgerRow],
        failures: Sequence[FailureRow],
        settled: Sequence[Settled],
    ) -> None:
        for ticket, doubt in settled:
            intent = self.open.pop(ticket)
            self.doubts += [(intent, doubt)] if doubt else []
        self.rows |= {row.key: row for row in rows}
        self.failures |= {failure.key: failure for failure in failures}


def make_runner(
    client: FeedbackClient,
    ledger: MemoryLedger,
    *,
    plan: QuestionPlan = PLAN,
    max_attempts: int = 3,
    max_in_flight: int = 4,
    limiter: Limiter | None = None,
    price: Price = FREE,
) -> BatchRunner:
    policy = RetryPolicy(max_attempts=max_attempts, base_wait_s=0.001, max_wait_s=0.002)
    return BatchRunner(
        client,
        plan,
        ledger,
        policy=policy,
        price=price,
        max_in_flight=max_in_flight,
        limiter=limiter,
    )


def batch_of(count: int) -> PairBatch:
    return PairBatch(0, tuple(make_pairs(count)))


def failing(times: int, error: AttemptError) -> Callable[[Question], None]:
    """Raises `error` on the first `times` attempts of every question."""
    seen: dict[bytes, int] = {}

    def before(question: Question) -> None:
        seen[question.key] = seen.get(question.key, 0) + 1
        if seen[question.key] <= times:
            raise error

    return before
