"""From the answers in one or both orders to a Judgement: the position bias is taken out, never the doubt.

    l_AB = logP(A) - logP(B) with response_a shown first; l_BA the same with response_b shown first
    both orders:     log_odds = (l_AB - l_BA) / 2,  position_bias = (l_AB + l_BA) / 2
    one random slot: log_odds = l_AB - beta  or  -(l_BA - beta), beta fitted once per principle

The swap cancels an additive bias exactly. Without it a judge's taste for A leaks into the label (ALGORITHMS.md
section 1). What cannot be judged is marked with a reason and has NaN log-odds, never a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from morlaif_ray.errors import FeedbackError
from morlaif_ray.types import Judgement, JudgementStatus, Order

NAN = float("nan")
MIN_SLOT_ANSWERS = 5
"""Fewest answers per slot from which a principle's position bias may be fitted."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One order's answer as it stands in the ledger. Produced by the answering loop, consumed here."""

    log_odds: float
    """For the response shown first, nats; NaN when unreadable or failed."""
    mass: float
    reason: str
    """Why it is unreadable or failed; empty otherwise."""
    model: str
    failed: bool = False
    """True where no answer could be had at all (to be asked again), False where an answer is unreadable."""


@dataclass(frozen=True, slots=True)
class CombineRule:
    tie_threshold: float
    """|log-odds| below this (nats) is a tie."""
    min_answer_mass: float
    """A/B probability mass below this makes an answer unusable."""


def combine_orders(
    pair_id: str, principle: str, ab: Answer, ba: Answer, rule: CombineRule
) -> Judgement:
    """Both orders -> one judgement of response_a over response_b."""
    for order, answer in (("ab", ab), ("ba", ba)):
        problem = _problem(answer, rule)
        if problem:
            return _missing(pair_id, principle, f"{order}: {problem}", answer)
    log_odds = (ab.log_odds - ba.log_odds) / 2.0
    bias = (ab.log_odds + ba.log_odds) / 2.0
    status: JudgementStatus = "tie" if abs(log_odds) < rule.tie_threshold else "ok"
    return Judgement(pair_id, principle, status, log_odds, bias, "", ab.model)


def combine_single(
    pair_id: str, principle: str, order: Order, answer: Answer, bias: float, rule: CombineRule
) -> Judgement:
    """One order and the principle's fitted position bias -> one judgement; its own bias stays unknown (NaN)."""
    problem = _problem(answer, rule)
    if problem:
        return _missing(pair_id, principle, f"{order}: {problem}", answer)
    log_odds = answer.log_odds - bias
    if order == "ba":
        log_odds = -log_odds
    status: JudgementStatus = "tie" if abs(log_odds) < rule.tie_threshold else "ok"
    return Judgement(pair_id, principle, status, log_odds, NAN, "", answer.model)


def fit_position_bias(
    principle: str, answers: Iterable[tuple[Order, Answer]], rule: CombineRule
) -> float:
    """The additive bias of a principle from randomly slotted answers: the mean of the two slots' means.

    With l_AB = l + beta and l_BA = -l + beta and slots drawn independently of l, the expected l cancels.
    FeedbackError where a slot has fewer than MIN_SLOT_ANSWERS usable answers.
    """
    slots: dict[Order, list[float]] = {"ab": [], "ba": []}
    for order, answer in answers:
        if not _problem(answer, rule):
            slots[order].append(answer.log_odds)
    fewest = min(len(values) for values in slots.values())
    if fewest < MIN_SLOT_ANSWERS:
        raise FeedbackError(
            f"feedback.orders is 'random' but principle '{principle}' has only {fewest} usable answers in one "
            f"order, too few to fit its position bias ({MIN_SLOT_ANSWERS} needed); write orders: both"
        )
    return sum(math.fsum(values) / len(values) for values in slots.values()) / 2.0


def _missing(pair_id: str, principle: str, reason: str, answer: Answer) -> Judgement:
    status: JudgementStatus = "failed" if answer.failed else "unusable"
    return Judgement(pair_id, principle, status, NAN, NAN, reason, answer.model)


def _problem(answer: Answer, rule: CombineRule) -> str:
    """Why an answer cannot be used; empty when it can."""
    if answer.reason:
        return answer.reason
    if math.isnan(answer.log_odds):
        return "no log-odds"
    if answer.mass < rule.min_answer_mass:
        return f"A/B mass below {rule.min_answer_mass:g}"
    return ""
