"""Joint requests: which questions travel together, under which keys, and how they are paid and compared."""

from __future__ import annotations

import asyncio
import dataclasses
import math

import pytest
from pydantic import ValidationError

from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.feedback.client import Question, RawAnswer
from morlaif_ray.feedback.joint import (
    agreement_with_separate,
    answers_for,
    check_sample,
    joint_groups,
    joint_question,
)
from morlaif_ray.feedback.parsing import hard_logprobs
from morlaif_ray.feedback.questions import QuestionPlan
from morlaif_ray.types import Judgement, JudgementStatus
from tests.unit.feedback.fakes import MemoryLedger, batch_of, make_pairs, make_runner

pytestmark = pytest.mark.unit
NAMES = ("one", "two", "three", "general")
SEPARATE = QuestionPlan(tuple((name, f"{name}?") for name in NAMES), "both", 0, "recipe")
JOINT = dataclasses.replace(SEPARATE, joint=2)


class JointJudge:
    """Prefers the longer response; answers joint questions part by part. 100 prompt tokens a request."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    async def ask(self, question: Question) -> RawAnswer:
        self.asked.append(question)
        letter = "A" if len(question.first) > len(question.second) else "B"
        answer = RawAnswer(hard_logprobs(letter), "fake", 100, 1)
        free = dataclasses.replace(answer, prompt_tokens=0, completion_tokens=0)
        return dataclasses.replace(answer, parts=(free,) * len(question.members))

    async def close(self) -> None:
        return None


def test_principles_go_in_groups_and_the_overall_question_alone() -> None:
    assert joint_groups(JOINT.principles, 2) == ((0, 1), (2,), (3,))
    assert joint_groups(JOINT.principles, 12) == ((0, 1, 2), (3,))
    assert joint_groups(JOINT.principles, 1) == ((0,), (1,), (2,), (3,))


def test_a_joint_answer_has_another_key_than_a_separate_one_and_a_group_of_one_the_same() -> None:
    pair = make_pairs(1)[0]
    alone = {(q.principle, q.order): q.key for q in SEPARATE.questions(pair)}
    joint = {(q.principle, q.order): q.key for q in JOINT.questions(pair)}
    changed = {name for (name, _), key in joint.items() if alone[(name, "ab")] != key and _ == "ab"}
    assert changed == {"one", "two"}
    assert len(set(joint.values())) == 8


def test_strengths_have_keys_of_their_own_and_a_group_of_one_keeps_its_key() -> None:
    pair = make_pairs(1)[0]
    strong = dataclasses.replace(JOINT, strengths=True)
    letters, numbers = JOINT.questions(pair), strong.questions(pair)
    changed = {a.principle for a, b in zip(letters, numbers, strict=True) if a.key != b.key}
    assert changed == {"one", "two"}
    joined = joint_question(numbers[:2])
    assert "whole number for each name" in joined.phrase
    assert "Names: one, two." in joined.phrase
    assert 'gives "A" or "B"' in joint_question(letters[:2]).phrase


def test_the_members_of_a_random_slot_are_asked_in_one_order() -> None:
    plan = dataclasses.replace(SEPARATE, orders="random", joint=3)
    for pair in make_pairs(20):
        orders = [order for _, order in plan.slots(pair.pair_id)]
        assert len(set(orders[:3])) == 1


def test_one_request_answers_its_group_and_everything_is_recorded_once() -> None:
    judge, ledger = JointJudge(), MemoryLedger()
    outcome = asyncio.run(make_runner(judge, ledger, plan=JOINT).run(batch_of(3)))
    assert len(judge.asked) == 3 * 2 * 3  # pairs x orders x groups
    assert len(ledger.rows) == 3 * 2 * 4
    assert outcome.num_failed == 0
    assert outcome.prompt_tokens == sum(row.prompt_tokens for row in ledger.rows.values()) == 1800


def test_a_group_of_which_a_crash_recorded_a_part_is_asked_whole_and_keeps_what_was_recorded() -> (
    None
):
    ledger = MemoryLedger()
    asyncio.run(make_runner(JointJudge(), ledger, plan=JOINT).run(batch_of(1)))
    lost = next(key for key, row in ledger.rows.items() if row.principle == "two")
    del ledger.rows[lost]
    before = dict(ledger.rows)
    judge = JointJudge()
    asyncio.run(make_runner(judge, ledger, plan=JOINT).run(batch_of(1)))
    assert [len(question.members) for question in judge.asked] == [2]
    assert {key: row for key, row in ledger.rows.items() if key != lost} == before
    assert ledger.rows[lost].prompt_tokens == 100  # the second request is paid, and counted


def test_the_cost_of_a_request_stands_on_the_first_wanted_answer() -> None:
    part = RawAnswer({"A": -0.1}, "m", 0, 0)
    answer = RawAnswer({}, "m", 70, 5, parts=(part, part, part))
    found = answers_for(answer, [False, True, True])
    assert [(entry.prompt_tokens, entry.completion_tokens) for entry in found] == [(70, 5), (0, 0)]


def test_a_single_member_is_asked_as_it_is() -> None:
    question = SEPARATE.questions(make_pairs(1)[0])[0]
    assert joint_question([question]) is question


def judgement(pair: str, name: str, log_odds: float, status: JudgementStatus = "ok") -> Judgement:
    return Judgement(pair, name, status, log_odds, 0.0, "", "m")


def test_agreement_counts_equal_signs_of_decided_judgements_only() -> None:
    joint = [
        judgement("p", "one", 2.0),
        judgement("q", "one", 2.0),
        judgement("p", "two", 0.0, "tie"),
        judgement("q", "two", 2.0),
        judgement("r", "one", -2.0),
        judgement("p", "general", 2.0),
    ]
    separate = [
        judgement("p", "one", 0.7),
        judgement("q", "one", -0.3),
        judgement("p", "two", 1.0),
        judgement("q", "two", math.nan, "failed"),
        judgement("r", "one", -1.0),
        judgement("p", "general", -2.0),
    ]
    found = agreement_with_separate(joint, separate, 3)
    assert found["agreement"] == pytest.approx(2 / 3)
    assert (found["num_pairs"], found["num_compared"]) == (3, 3)
    assert (found["num_ties"], found["num_missing"]) == (1, 1)
    assert found["by_principle"] == {"one": {"agreement": pytest.approx(2 / 3), "num": 3}}
    assert 0.0 < found["low"] < 2 / 3 < found["high"] < 1.0
    # (2, 0.7), (2, -0.3), (0, 1), (-2, -1): what both answered, ties included, "general" not.
    assert found["correlation"] == pytest.approx(0.4919, abs=1e-3)
    sure = 1 / (1 + math.exp(-2.0))
    others = [1 / (1 + math.exp(-value)) for value in (0.7, -0.3, 1.0, -1.0)]
    gaps = [sure - others[0], sure - others[1], others[2] - 0.5, others[3] - (1 - sure)]
    assert found["mean_gap"] == pytest.approx(sum(gaps) / 4)


def test_the_sample_follows_the_pairs_content_and_holds_at_least_one() -> None:
    pairs = make_pairs(50)
    chosen = check_sample(pairs, 0.1, seed=3)
    assert len(chosen) == 5
    assert {p.pair_id for p in check_sample(pairs[::-1], 0.1, seed=3)} == {
        p.pair_id for p in chosen
    }
    assert len(check_sample(pairs, 0.001, seed=3)) == 1
    assert check_sample(pairs, 0.0, seed=3) == []


def test_joint_questions_need_a_judge_that_writes() -> None:
    with pytest.raises(ValidationError, match=r"feedback\.joint is 3 but judge.kind 'rules'"):
        FeedbackConfig.model_validate({"joint": 3})


def test_strengths_do_not_go_with_examples_of_letters() -> None:
    judge = {"kind": "openai", "model": "m"}
    example = {
        "conversation": "c",
        "response_a": "a",
        "response_b": "b",
        "question": "q",
        "answer": "A",
    }
    with pytest.raises(ValidationError, match=r"few_shot shows answers that are letters"):
        FeedbackConfig.model_validate(
            {"judge": judge, "joint": 2, "joint_answer": "strength", "few_shot": [example]}
        )
