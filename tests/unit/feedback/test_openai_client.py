"""The real `openai` client against a server that misbehaves."""

from __future__ import annotations

import asyncio
import math

import pytest

from morlaif_ray.config.judging import OpenAIJudge
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.judges import build_client
from morlaif_ray.feedback.parsing import parse_answer
from morlaif_ray.feedback.prices import price_for_budget, price_of
from tests.fake_openai.server import KEY, MODEL, FakeOpenAI, true_log_odds
from tests.unit.feedback.fakes import MemoryLedger, batch_of, make_runner, words_difference

pytestmark = pytest.mark.unit
FIRST, SECOND = " three words here", " one"


def judge(server: FakeOpenAI, **changes: object) -> OpenAIJudge:
    values = {"model": "fake-judge", "base_url": server.url, "api_key_env": "TEST_JUDGE_KEY"}
    return OpenAIJudge.model_validate(values | changes)


def ask(config: OpenAIJudge) -> RawAnswer:
    async def once() -> RawAnswer:
        client = build_client(config, seed=0)
        try:
            return await client.ask(
                Question(
                    "\n\nHuman: hi\n\nAssistant:",
                    FIRST,
                    SECOND,
                    "detail",
                    "More detail?",
                    "ab",
                    b"k" * 16,
                )
            )
        finally:
            await client.close()

    return asyncio.run(once())


def failure(config: OpenAIJudge) -> AttemptError:
    with pytest.raises(AttemptError) as caught:
        ask(config)
    assert KEY not in str(caught.value)
    return caught.value


def test_one_token_is_asked_with_log_probabilities_and_read_back(server: FakeOpenAI) -> None:
    answer = ask(judge(server, system_prompt="Be fair.", top_logprobs=5))
    assert parse_answer(answer).log_odds == pytest.approx(true_log_odds(FIRST, SECOND))
    assert (answer.model, answer.completion_tokens) == (MODEL, 1)
    body = server.bodies[0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["temperature"]) == (
        1,
        True,
        5,
        0.0,
    )
    assert body["messages"][0] == {"role": "system", "content": "Be fair."}
    assert body["messages"][1]["content"].endswith(
        "More detail? Answer with a single letter, A or B."
    )


def test_a_lower_case_answer_is_read(server: FakeOpenAI) -> None:
    server.faults.append("lower_case")
    assert parse_answer(ask(judge(server))).log_odds == pytest.approx(true_log_odds(FIRST, SECOND))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no_logprobs", "no log-probabilities in the answer"),
        ("refusal", "the judge refused"),
        ("no_letters", "neither A nor B among the top tokens"),
    ],
)
def test_an_unreadable_answer_is_an_answer_without_log_odds(
    server: FakeOpenAI, fault: str, reason: str
) -> None:
    server.faults.append(fault)
    parsed = parse_answer(ask(judge(server)))
    assert math.isnan(parsed.log_odds)
    assert parsed.reason == reason


@pytest.mark.parametrize(
    ("fault", "kind", "retry_after_s"),
    [
        ("429", "rate_limit", 0.2),
        ("429-bare", "rate_limit", None),
        ("429-quota", "quota", None),
        ("500", "server", None),
        ("503", "server", 0.1),
        ("400", "bad_request", None),
        ("404", "not_found", None),
        ("reset", "connection", None),
        ("invalid_json", "malformed", None),
        ("not_a_completion", "malformed", None),
    ],
)
def test_a_fault_becomes_an_attempt_error_after_one_request(
    server: FakeOpenAI, fault: str, kind: str, retry_after_s: float | None
) -> None:
    server.faults.append(fault)
    error = failure(judge(server))
    assert (error.kind, error.retry_after_s) == (kind, retry_after_s)
    assert len(server.bodies) == 1  # the SDK's own retries are off


def test_a_hang_ends_at_the_time_out(server: FakeOpenAI) -> None:
    server.faults.append("hang")
    error = failure(judge(server, request_timeout_s=0.3))
    assert error.kind == "timeout"
    assert error.message.endswith("within 0.3 s")


def test_a_wrong_key_is_one_clear_line_without_the_key(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "sk-wrong-and-secret")
    error = failure(judge(server))
    assert error.kind == "auth"
    assert "TEST_JUDGE_KEY (HTTP 401)" in error.message
    assert "sk-wrong" not in error.message


def test_a_missing_key_fails_before_any_request(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_JUDGE_KEY")
    with pytest.raises(FeedbackError, match="environment variable TEST_JUDGE_KEY is not set"):
        build_client(judge(server), seed=0)


def test_with_every_fault_in_between_all_questions_end_right_and_are_recorded_once(
    server: FakeOpenAI,
) -> None:
    server.faults.extend(
        ["429", "ok", "500", "reset", "invalid_json", "ok", "503", "not_a_completion", "hang"]
    )
    ledger = MemoryLedger()

    async def work():  # type: ignore[no-untyped-def]
        client = build_client(judge(server, request_timeout_s=2.0), seed=0)
        try:
            return await make_runner(client, ledger, max_attempts=6).run(batch_of(4))
        finally:
            await client.close()

    outcome = asyncio.run(work())
    assert outcome.num_failed == 0
    assert len(ledger.rows) == server.num_answered == 16
    expected = [
        0.5 * words_difference(q) + 0.7
        for q in make_runner(None, ledger)._plan.batch_questions(batch_of(4))
    ]  # type: ignore[arg-type]
    assert outcome.log_odds_N.tolist() == pytest.approx(expected)
    assert outcome.prompt_tokens + outcome.completion_tokens == server.tokens_billed


def test_prices_are_found_by_model_name_with_or_without_date() -> None:
    assert price_of(OpenAIJudge(model="gpt-4o-mini-2024-07-18")) == price_of(
        OpenAIJudge(model="gpt-4o-mini")
    )
    price = price_of(OpenAIJudge(model="gpt-4o"))
    assert price is not None
    assert price.cost_usd(1_000_000, 100_000) == pytest.approx(2.50 + 1.00)
    assert price_of(OpenAIJudge(model="gpt-4o", base_url="http://localhost:8000/v1")) is None


def test_a_budget_for_a_model_without_known_price_is_refused() -> None:
    with pytest.raises(FeedbackError, match="price of model 'mystery' is not known"):
        price_for_budget(OpenAIJudge(model="mystery"), 5.0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401", r"refused the key in TEST_JUDGE_KEY \(HTTP 401\)"),
        ("404", "knows no model 'fake-judge'"),
        ("429-quota", "has no quota left"),
    ],
)
def test_what_no_question_can_survive_ends_the_run_in_one_line_without_a_retry_storm(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    if fault == "401":
        monkeypatch.setenv("TEST_JUDGE_KEY", "sk-wrong-and-secret")
    else:
        server.default_fault = fault

    async def work() -> None:
        client = build_client(judge(server), seed=0)
        try:
            await make_runner(client, MemoryLedger(), max_in_flight=4).run(batch_of(50))
        finally:
            await client.close()

    with pytest.raises(FeedbackError, match=message) as caught:
        asyncio.run(work())
    assert "\n" not in str(caught.value)
    assert "sk-wrong" not in str(caught.value)
    assert len(server.bodies) <= 8  # of 200 questions: those in flight, and none of them twice
