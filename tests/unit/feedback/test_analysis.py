"""Assembling and analysis by hand on tiny tables."""

from __future__ import annotations

import asyncio
import dataclasses
import math

import numpy as np
import pytest

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.analysis import (
    agreement_matrix,
    correlation_matrix,
    human_agreement,
    log_odds_table,
    matrix_rows,
    summarise,
    wilson_interval,
)
from morlaif_ray.feedback.assembling import assemble, check_missing
from morlaif_ray.feedback.combining import CombineRule
from morlaif_ray.feedback.questions import QuestionPlan
from morlaif_ray.types import Judgement
from tests.unit.feedback.fakes import (
    PLAN,
    FakeJudge,
    MemoryLedger,
    batch_of,
    make_pairs,
    make_runner,
)

pytestmark = pytest.mark.unit
RULE = CombineRule(tie_threshold=0.05, min_answer_mass=0.5)
NAN = float("nan")


def judgement(
    pair: str, principle: str, log_odds: float, status: str = "ok", reason: str = ""
) -> Judgement:
    return Judgement(pair, principle, status, log_odds, 0.4, reason, "j")  # type: ignore[arg-type]


def asked(plan: QuestionPlan, count: int):  # type: ignore[no-untyped-def]
    return asyncio.run(make_runner(FakeJudge(), MemoryLedger(), plan=plan).run(batch_of(count)))


def test_both_orders_give_the_judges_opinion_without_its_position_bias() -> None:
    assembled = assemble(
        PLAN, [batch_of(3)], [asked(PLAN, 3)], RULE, {f"pair{i}": "detail" for i in range(3)}
    )
    detail = [entry for entry in assembled.judgements if entry.principle == "detail"]
    # response_a has 1, 2, 3 words, response_b two: -1, 0, +1 nats; the fake judge's bias is 0.5.
    assert [entry.log_odds for entry in detail] == pytest.approx([-1.0, 0.0, 1.0])
    assert [entry.status for entry in detail] == ["ok", "tie", "ok"]
    assert [entry.position_bias for entry in detail] == pytest.approx([0.5, 0.5, 0.5])


def test_the_random_question_repeats_the_drawn_principles_judgement() -> None:
    assembled = assemble(
        PLAN, [batch_of(2)], [asked(PLAN, 2)], RULE, {"pair0": "detail", "pair1": "detail"}
    )
    names = [entry.principle for entry in assembled.judgements]
    assert names == ["detail", "general", "random"] * 2
    detail, _, random = assembled.judgements[:3]
    assert dataclasses.replace(random, principle="detail") == detail


def test_one_random_slot_recovers_opinion_and_bias_on_average() -> None:
    plan = dataclasses.replace(PLAN, orders="random")
    assembled = assemble(plan, [batch_of(60)], [asked(plan, 60)], RULE, {})
    # Slots are drawn independently of the opinions (-1 .. 58), so the fit is right up to sampling error.
    spread = np.std([i - 1 for i in range(60)]) / math.sqrt(60)
    assert abs(assembled.position_bias["detail"] - 0.5) < 4 * spread
    error = assembled.position_bias["detail"] - 0.5
    for entry in assembled.judgements:
        opinion = int(entry.pair_id.removeprefix("pair")) - 1
        if entry.principle == "detail":
            assert abs(entry.log_odds - opinion) == pytest.approx(abs(error))


def test_too_many_missing_judgements_name_the_most_frequent_reasons() -> None:
    judgements = [judgement(f"p{i}", "detail", 1.0) for i in range(6)]
    judgements += [judgement("p6", "detail", NAN, "unusable", "ab: the judge refused")]
    judgements += [judgement("p7", "detail", NAN, "failed", "ba: timeout") for _ in range(3)]
    with pytest.raises(
        FeedbackError,
        match=r"4 of 10 judgements .*40.0%, allowed 5.0%\): 3 x timeout; 1 x the judge",
    ):
        check_missing(judgements, 0.05)
    check_missing(judgements, 0.4)


def test_agreement_leaves_out_ties_and_missing_pair_by_pair() -> None:
    judgements = [
        *(judgement(f"p{i}", "x", value) for i, value in enumerate([1.0, -2.0, 0.5, 3.0])),
        judgement("p0", "y", 0.4),
        judgement("p1", "y", 0.4),
        judgement("p2", "y", 0.01, "tie"),
        judgement("p3", "y", NAN, "unusable"),
        *(judgement(f"p{i}", "z", NAN, "failed") for i in range(4)),
    ]
    log_odds_PK, decided_PK = log_odds_table(judgements, ["x", "y", "z"])
    agreement = agreement_matrix(decided_PK)
    assert agreement[0, 1] == 0.5  # p0 agrees, p1 does not, p2 is a tie, p3 is missing
    assert agreement[0, 0] == 1.0
    assert math.isnan(agreement[0, 2])
    assert not math.isnan(log_odds_PK[2, 1])
    assert matrix_rows(agreement, ["x", "y", "z"])[0] == {
        "principle": "x",
        "x": 1.0,
        "y": 0.5,
        "z": "",
    }


def test_correlation_is_pearsons() -> None:
    table = np.array([[1.0, 2.0, 5.0], [2.0, 4.0, 5.0], [3.0, 7.0, 5.0], [NAN, 1.0, 5.0]])
    correlation = correlation_matrix(table)
    assert correlation[0, 1] == pytest.approx(np.corrcoef([1, 2, 3], [2, 4, 7])[0, 1])
    assert math.isnan(correlation[0, 2])  # no spread, no correlation


def test_wilson_interval_of_eight_in_ten() -> None:
    # The textbook value: 0.8 with [0.490, 0.943].
    interval = wilson_interval(8, 10)
    assert (interval.value, interval.num) == (0.8, 10)
    assert interval.low == pytest.approx(0.4902, abs=1e-4)
    assert interval.high == pytest.approx(0.9433, abs=1e-4)
    assert math.isnan(wilson_interval(0, 0).value)


def test_human_agreement_counts_decided_and_labelled_pairs_only() -> None:
    judgements = [
        judgement("p0", "x", 1.0),
        judgement("p1", "x", -1.0),
        judgement("p2", "x", 0.01, "tie"),
        judgement("p3", "x", 1.0),
    ]
    interval = human_agreement(judgements, {"p0": 1.0, "p1": 1.0, "p2": 1.0, "p3": NAN})
    assert (interval.value, interval.num) == (0.5, 2)


def test_the_summary_counts_what_was_asked_and_what_came() -> None:

    outcome = asked(PLAN, 4)
    pairs = make_pairs(4)
    assembled = assemble(
        PLAN, [batch_of(4)], [outcome], RULE, {pair.pair_id: "detail" for pair in pairs}
    )
    summary = summarise(pairs, assembled.judgements, [outcome], assembled.position_bias, ["detail"])
    assert summary["judge"] == "fake-1"
    assert (summary["num_questions"], summary["num_judgements"]) == (16, 12)
    assert (summary["num_usable"], summary["num_ties"]) == (12, 3)
    assert summary["tokens"] == 16 * 101
    detail = summary["by_principle"]["detail"]
    # Pair 1 is a tie; the others are labelled by the same words that the judge counts.
    assert (detail["num_human"], detail["human_agreement"]) == (3, 1.0)
    assert detail["mean_position_bias"] == pytest.approx(0.5)
    assert set(summary["by_principle"]) == {"detail", "general", "random"}
