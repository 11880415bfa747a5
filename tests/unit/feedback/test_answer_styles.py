"""Reasoning, structured and joint answers: the real client against the fake server, end to end into log-odds."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math

import pytest
from openai.types.chat import ChatCompletion

from morlaif_ray.config.judging import FeedbackConfig, OpenAIJudge
from morlaif_ray.errors import ConfigError
from morlaif_ray.feedback.client import Question, RawAnswer
from morlaif_ray.feedback.fewshot import with_examples_inlined
from morlaif_ray.feedback.joint import joint_question
from morlaif_ray.feedback.judges import (
    answer_tokens,
    build_feedback_client,
    judge_identity,
    recipe_for,
    recipe_of,
)
from morlaif_ray.feedback.openai_requests import read_completion
from morlaif_ray.feedback.parsing import HARD_LOG_ODDS, parse_answer
from morlaif_ray.feedback.questions import QuestionPlan
from morlaif_ray.feedback.recording import BatchOutcome
from tests.fake_openai.answers import one_token_answer
from tests.fake_openai.server import FakeOpenAI, true_log_odds
from tests.unit.feedback.fakes import MemoryLedger, batch_of, make_runner

pytestmark = pytest.mark.unit
FIRST, SECOND = " three words here", " one"


def feedback(
    server: FakeOpenAI | None = None, judge: dict[str, object] | None = None, **rest: object
):  # type: ignore[no-untyped-def]
    url = server.url if server is not None else "http://127.0.0.1:1/v1"
    values = {"kind": "openai", "model": "m", "base_url": url, "api_key_env": "TEST_JUDGE_KEY"}
    return FeedbackConfig.model_validate({"judge": values | (judge or {}), **rest})


def question(name: str = "detail", first: str = FIRST, second: str = SECOND) -> Question:
    key = name.encode().ljust(16, b"k")
    return Question("\n\nHuman: hi\n\nAssistant:", first, second, name, f"More {name}?", "ab", key)


def ask(config: FeedbackConfig, asked: Question) -> RawAnswer:
    async def once() -> RawAnswer:
        client = build_feedback_client(config, seed=0)
        try:
            return await client.ask(asked)
        finally:
            await client.close()

    return asyncio.run(once())


def test_after_reasoning_the_letter_of_the_last_answer_marker_counts(server: FakeOpenAI) -> None:
    answer = ask(feedback(server, {"reasoning": {"max_tokens": 50}}), question())
    assert parse_answer(answer).log_odds == pytest.approx(true_log_odds(FIRST, SECOND))
    body = server.bodies[0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (50, True, 20)
    assert body["messages"][-1]["content"].endswith("'Answer: A' or 'Answer: B'.")
    assert answer.completion_tokens == 12


def test_reasoning_that_is_cut_off_is_unusable_and_says_what_to_raise(server: FakeOpenAI) -> None:
    parsed = parse_answer(ask(feedback(server, {"reasoning": {"max_tokens": 5}}), question()))
    assert math.isnan(parsed.log_odds)
    assert parsed.reason.endswith("raise judge.reasoning.max_tokens")


def test_a_structured_answer_is_a_hard_label_under_a_schema_of_two_letters(
    server: FakeOpenAI,
) -> None:
    config = feedback(server, {"answer": "structured"})
    longer, shorter = ask(config, question()), ask(config, question(first=SECOND, second=FIRST))
    assert parse_answer(longer).log_odds == pytest.approx(HARD_LOG_ODDS)
    assert parse_answer(shorter).log_odds == pytest.approx(-HARD_LOG_ODDS)
    assert parse_answer(longer).mass == pytest.approx(1.0)
    body = server.bodies[0]
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"answer": {"type": "string", "enum": ["A", "B"]}}
    assert "logprobs" not in body


def test_reasoning_comes_before_the_answer_in_a_structured_answer(server: FakeOpenAI) -> None:
    config = feedback(server, {"answer": "structured", "reasoning": {"max_tokens": 100}})
    assert parse_answer(ask(config, question())).log_odds == pytest.approx(HARD_LOG_ODDS)
    schema = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["reasoning", "answer"]


def test_a_joint_request_gives_each_principle_its_answer_and_is_billed_once(
    server: FakeOpenAI,
) -> None:
    asked = joint_question([question("detail"), question("not_brief"), question("kind")])
    answer = ask(feedback(server, joint=3), asked)
    found = [parse_answer(part).log_odds for part in answer.parts]
    assert found == pytest.approx([HARD_LOG_ODDS, -HARD_LOG_ODDS, HARD_LOG_ODDS])
    assert [part.prompt_tokens > 0 for part in answer.parts] == [True, False, False]
    text = server.bodies[0]["messages"][-1]["content"]
    assert "- not_brief: More not_brief?" in text
    assert len(server.bodies) == 1


def test_a_joint_request_may_ask_for_strengths_and_gets_soft_preferences(
    server: FakeOpenAI,
) -> None:
    members = [
        dataclasses.replace(question(name), strength=True) for name in ("detail", "not_brief")
    ]
    answer = ask(feedback(server, joint=2, joint_answer="strength"), joint_question(members))
    truth = true_log_odds(FIRST, SECOND)
    found = [parse_answer(part).log_odds for part in answer.parts]
    assert found == pytest.approx([truth, -truth], abs=0.05)  # whole percents
    assert abs(truth) != pytest.approx(HARD_LOG_ODDS, abs=0.1)
    schema = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["detail"] == {"type": "integer", "minimum": 0, "maximum": 100}
    assert "100 if surely A" in server.bodies[0]["messages"][-1]["content"]


def test_a_strength_that_is_missing_is_unusable_with_a_reason() -> None:
    member = dataclasses.replace(question(), strength=True)
    body = one_token_answer({"messages": []}, 1.0, "m")
    body["choices"][0]["message"]["content"] = '{"detail": 50}'
    asked = joint_question([member, dataclasses.replace(question("kind"), strength=True)])
    found = read_completion(ChatCompletion.construct(**body), feedback().judge, asked, "here")
    assert [part.problem for part in found.parts] == [
        "",
        "the JSON answer has no number for 'kind'",
    ]


def test_the_fields_sent_follow_the_model(server: FakeOpenAI) -> None:
    judge = {
        "answer": "structured",
        "temperature": None,
        "max_tokens_field": "max_completion_tokens",
    }
    ask(feedback(server, judge), question())
    assert "temperature" not in server.bodies[0]
    assert "max_tokens" not in server.bodies[0]
    assert server.bodies[0]["max_completion_tokens"] == 16


def test_few_shot_examples_stand_before_the_question_in_its_own_form(server: FakeOpenAI) -> None:
    example = {
        "conversation": "Human: hey",
        "response_a": "x",
        "response_b": "y z",
        "question": "Longer?",
        "answer": "B",
        "reasoning": "y z has two words.",
    }
    ask(feedback(server, few_shot=[example]), question())
    ask(feedback(server, {"reasoning": {"max_tokens": 50}}, few_shot=[example]), question())
    ask(feedback(server, {"answer": "structured"}, few_shot=[example]), question())
    shown = [[message["role"] for message in body["messages"]] for body in server.bodies]
    assert shown == [["user", "assistant", "user"]] * 3
    answers = [body["messages"][1]["content"] for body in server.bodies]
    assert answers == ["B", "y z has two words.\nAnswer: B", json.dumps({"answer": "B"})]
    assert "<response_A>\nx\n</response_A>" in server.bodies[0]["messages"][0]["content"]


def test_an_example_file_with_a_wrong_answer_is_named_with_file_and_entry(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "examples.yaml"
    path.write_text("- {conversation: a, response_a: b, response_b: c, question: d, answer: C}\n")
    with pytest.raises(ConfigError, match=r"examples.yaml, example 1: answer: Input should be 'A'"):
        recipe_for(feedback(few_shot=str(path)), 0)


def test_an_example_file_that_is_missing_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=r"few_shot: .*none.yaml cannot be read \(No such file"):
        recipe_for(feedback(few_shot=str(tmp_path / "none.yaml")), 0)


def test_the_longest_answer_is_what_a_budget_counts_with() -> None:
    joint = joint_question([question("one"), question("two")])
    assert answer_tokens(feedback().judge, question()) == 1.0
    assert (
        answer_tokens(feedback(judge={"reasoning": {"max_tokens": 50}}).judge, question()) == 50.0
    )
    assert answer_tokens(feedback(judge={"answer": "structured"}).judge, question()) == 16.0
    assert answer_tokens(feedback().judge, joint) == 48.0


def test_what_changes_an_answer_changes_the_key_and_what_does_not_does_not() -> None:
    plain = recipe_for(feedback(), 0)
    assert plain == recipe_of(feedback().judge, 0)
    template = "{conversation} {response_a} {response_b} {question}"
    changed = [
        feedback(template=template),
        feedback(max_prompt_tokens=500),
        feedback(judge={"reasoning": {}}),
        feedback(judge={"answer": "structured"}),
        feedback(judge={"system_prompt": "Be fair."}),
    ]
    recipes = [recipe_for(config, 0) for config in changed]
    assert len({plain, *recipes}) == 6
    same = [
        feedback(judge={"kind": "openai_batch"}),
        feedback(judge={"request_timeout_s": 5.0, "api_key_env": "OTHER"}),
        feedback(joint=4, budget_usd=5.0),
    ]
    assert {recipe_for(config, 0) for config in same} == {plain}


def test_the_first_endpoint_names_the_judge_so_more_servers_keep_what_is_paid() -> None:
    one = OpenAIJudge(model="m", base_url="http://a/v1")
    two = OpenAIJudge.model_validate(
        {"model": "m", "endpoints": [{"base_url": "http://a/v1"}, {"base_url": "http://b/v1"}]}
    )
    assert judge_identity(one, 0) == judge_identity(two, 0)


def test_joint_questions_survive_every_fault_and_spend_what_the_server_counted(
    server: FakeOpenAI,
) -> None:
    server.faults.extend(["429", "ok", "500", "reset", "invalid_json", "503", "not_a_completion"])
    config = feedback(server, {"request_timeout_s": 60.0}, joint=3)
    names = (
        ("detail", "Longer?"),
        ("not_brief", "Not brief?"),
        ("kind", "Kind?"),
        ("general", "?"),
    )
    plan = QuestionPlan(names, "both", 0, "recipe", joint=3)
    ledger = MemoryLedger()

    async def work() -> BatchOutcome:
        client = build_feedback_client(config, seed=0)
        try:
            return await make_runner(client, ledger, plan=plan, max_attempts=9).run(batch_of(4))
        finally:
            await client.close()

    outcome = asyncio.run(work())
    assert outcome.num_failed == 0
    assert len(ledger.rows) == 4 * 8
    assert server.num_answered == 4 * 4  # pairs x orders x (one joint request and "general")
    assert outcome.prompt_tokens + outcome.completion_tokens == server.tokens_billed
    for row in ledger.rows.values():
        if row.principle == "not_brief":
            twin = next(
                other
                for other in ledger.rows.values()
                if (other.pair_id, other.slot, other.principle) == (row.pair_id, row.slot, "kind")
            )
            assert row.log_odds == pytest.approx(-twin.log_odds)


def test_examples_of_a_file_travel_inside_the_config_under_the_same_keys(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "examples.yaml"
    path.write_text("- {conversation: a, response_a: b, response_b: c, question: d, answer: B}\n")
    from_file = feedback(few_shot=str(path))
    recipe = recipe_for(from_file, 0)
    inlined = with_examples_inlined(from_file)
    path.unlink()
    assert recipe_for(inlined, 0) == recipe
    assert recipe != recipe_for(feedback(), 0)
