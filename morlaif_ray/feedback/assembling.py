"""From the workers' outcomes to the stage's judgements, in an order that depends on the pairs alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.asking import BatchOutcome
from morlaif_ray.feedback.combining import (
    Answer,
    CombineRule,
    combine_orders,
    combine_single,
    fit_position_bias,
)
from morlaif_ray.feedback.judgement_table import JudgementTable
from morlaif_ray.feedback.questions import RANDOM, PairBatch, QuestionPlan
from morlaif_ray.types import Judgement, Order


@dataclass(frozen=True, slots=True)
class Assembled:
    judgements: JudgementTable
    """Per pair: the K principles, "general", then "random"."""
    position_bias: dict[str, float]
    """Fitted bias (nats) per question where only one order was asked; empty where both were."""


def assemble(
    plan: QuestionPlan,
    batches: Sequence[PairBatch],
    outcomes: Sequence[BatchOutcome],
    rule: CombineRule,
    assignment: Mapping[str, str],
) -> Assembled:
    """Combines the orders of every pair and question.

    Args:
        outcomes: one per batch, same order.
        assignment: pair_id -> principle whose judgement is repeated as "random"; it costs no request.
    """
    assert [batch.index for batch in batches] == [outcome.index for outcome in outcomes], (
        "outcomes out of order"
    )
    if plan.orders == "both":
        return Assembled(_both(plan, batches, outcomes, rule, assignment), {})
    answered = [
        (
            pair.pair_id,
            list(zip(plan.slots(pair.pair_id), _answers(outcome, plan, number), strict=True)),
        )
        for batch, outcome in zip(batches, outcomes, strict=True)
        for number, pair in enumerate(batch.pairs)
    ]
    by_column: list[list[tuple[Order, Answer]]] = [[] for _ in plan.principles]
    for _, entries in answered:
        for (column, order), answer in entries:
            by_column[column].append((order, answer))
    names = [name for name, _ in plan.principles]
    bias = {
        name: fit_position_bias(name, by_column[column], rule) for column, name in enumerate(names)
    }
    judgements = JudgementTable()
    for pair_id, entries in answered:
        found = [
            combine_single(pair_id, names[column], order, answer, bias[names[column]], rule)
            for (column, order), answer in entries
        ]
        judgements.extend(_with_random(found, assignment.get(pair_id)))
    return Assembled(judgements, bias)


def _both(
    plan: QuestionPlan,
    batches: Sequence[PairBatch],
    outcomes: Sequence[BatchOutcome],
    rule: CombineRule,
    assignment: Mapping[str, str],
) -> JudgementTable:
    names = [name for name, _ in plan.principles]
    judgements = JudgementTable()
    for batch, outcome in zip(batches, outcomes, strict=True):
        for number, pair in enumerate(batch.pairs):
            answers = _answers(outcome, plan, number)
            found = [
                combine_orders(
                    pair.pair_id, name, answers[column], answers[column + len(names)], rule
                )
                for column, name in enumerate(names)
            ]
            judgements.extend(_with_random(found, assignment.get(pair.pair_id)))
    return judgements


def _with_random(found: list[Judgement], drawn: str | None) -> list[Judgement]:
    return found + [replace(entry, principle=RANDOM) for entry in found if entry.principle == drawn]


def _answers(outcome: BatchOutcome, plan: QuestionPlan, number: int) -> list[Answer]:
    """The answers about pair `number` of the batch, in plan order."""
    start = number * plan.per_pair
    stop = start + plan.per_pair
    columns = zip(
        outcome.log_odds_N[start:stop].tolist(),
        outcome.mass_N[start:stop].tolist(),
        outcome.failed_N[start:stop].tolist(),
        outcome.model_N[start:stop].tolist(),
        strict=True,
    )
    return [
        Answer(
            log_odds, mass, outcome.reasons.get(start + offset, ""), outcome.models[model], failed
        )
        for offset, (log_odds, mass, failed, model) in enumerate(columns)
    ]


def check_missing(judgements: Sequence[Judgement], max_missing_share: float) -> None:
    """FeedbackError naming the most frequent reasons where more than the allowed share is unusable or failed."""
    asked, reasons = 0, Counter[str]()
    for entry in judgements:
        if entry.principle == RANDOM:
            continue
        asked += 1
        if entry.status in ("unusable", "failed"):
            reasons[entry.reason.split(": ", 1)[-1]] += 1
    missing = reasons.total()
    if missing <= max_missing_share * asked:
        return
    worst = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    raise FeedbackError(
        f"{missing} of {asked} judgements are missing ({missing / asked:.1%}, allowed "
        f"{max_missing_share:.1%}): {worst}; answers so far are in the ledger: mend the judge and run again, or raise "
        f"feedback.max_missing_share"
    )
