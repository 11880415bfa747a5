"""Keys follow content, never position; plans are the same everywhere."""

from __future__ import annotations

import dataclasses

import pytest

from morlaif_ray.config.judging import OpenAIJudge, RulesJudge
from morlaif_ray.errors import PrincipleError
from morlaif_ray.feedback.judges import check_principles, judge_identity, recipe_of
from morlaif_ray.feedback.questions import GENERAL, plan_questions, random_assignment, split_batches
from morlaif_ray.principles import load_principles
from tests.unit.feedback.fakes import PLAN, make_pairs

pytestmark = pytest.mark.unit


def keys(plan=PLAN, count: int = 3) -> set[bytes]:  # type: ignore[no-untyped-def]
    return {question.key for pair in make_pairs(count) for question in plan.questions(pair)}


def test_each_pair_is_asked_by_each_principle_in_both_orders() -> None:
    pair = make_pairs(1)[0]
    asked = [(q.principle, q.order, q.first) for q in PLAN.questions(pair)]
    assert asked == [
        ("detail", "ab", pair.response_a),
        ("general", "ab", pair.response_a),
        ("detail", "ba", pair.response_b),
        ("general", "ba", pair.response_b),
    ]
    assert PLAN.per_pair == 4


def test_keys_are_distinct_and_do_not_depend_on_position_or_pair_id() -> None:
    assert len(keys()) == 12
    renamed = [dataclasses.replace(pair, pair_id="other") for pair in reversed(make_pairs(3))]
    assert {q.key for pair in renamed for q in PLAN.questions(pair)} == keys()


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "another judge"},
        {"principles": (("detail", "Other phrase?"), ("general", "Best?"))},
    ],
)
def test_another_judge_or_phrase_gives_other_keys(change: dict[str, object]) -> None:
    assert keys(dataclasses.replace(PLAN, **change)).isdisjoint(keys())  # type: ignore[arg-type]


def test_the_swapped_pair_reuses_the_answers_of_the_other_order() -> None:
    pair = make_pairs(1)[0]
    swapped = dataclasses.replace(pair, response_a=pair.response_b, response_b=pair.response_a)
    assert {q.key for q in PLAN.questions(swapped)} == {q.key for q in PLAN.questions(pair)}


def test_random_orders_ask_once_per_principle_in_a_seeded_slot() -> None:
    plan = dataclasses.replace(PLAN, orders="random")
    slots = [slot for pair in make_pairs(200) for slot in plan.slots(pair.pair_id)]
    assert len(slots) == 400
    assert 160 <= sum(order == "ab" for _, order in slots) <= 240
    assert slots == [slot for pair in make_pairs(200) for slot in plan.slots(pair.pair_id)]


def test_the_overall_question_comes_after_the_principles() -> None:
    plan = plan_questions(load_principles(["detail", "empathy"]), orders="both", seed=0, recipe="r")
    assert [name for name, _ in plan.principles] == ["empathy", "detail", GENERAL]


def test_batches_hold_whole_pairs_and_lose_none() -> None:
    batches = list(split_batches(make_pairs(7), PLAN, questions_per_batch=10))
    assert [len(batch.pairs) for batch in batches] == [2, 2, 2, 1]
    assert [batch.index for batch in batches] == [0, 1, 2, 3]


def test_the_random_principle_is_drawn_per_pair_by_seed() -> None:
    principles = load_principles()
    drawn = random_assignment(make_pairs(600), principles, seed=1)
    assert set(drawn.values()) == {principle.name for principle in principles}
    assert drawn == random_assignment(make_pairs(600), principles, seed=1)
    assert drawn != random_assignment(make_pairs(600), principles, seed=2)


def test_a_judges_identity_leaves_out_key_and_time_out() -> None:
    judge = OpenAIJudge(model="m")
    other = OpenAIJudge(model="m", api_key_env="OTHER_KEY", request_timeout_s=5.0)
    assert recipe_of(judge, seed=0) == recipe_of(other, seed=1)
    assert recipe_of(OpenAIJudge(model="n"), seed=0) != recipe_of(judge, seed=0)
    assert "api_key_env" not in judge_identity(judge, 0)


def test_the_embedded_judges_noise_makes_its_seed_part_of_it() -> None:
    assert recipe_of(RulesJudge(), seed=0) != recipe_of(RulesJudge(), seed=1)


def test_a_principle_without_a_measure_is_named() -> None:
    with pytest.raises(
        PrincipleError, match=r"no measure for principle 'humour'.*judge.kind: openai"
    ):
        check_principles(RulesJudge(), ["detail", "humour"])
    check_principles(OpenAIJudge(model="m"), ["humour"])
