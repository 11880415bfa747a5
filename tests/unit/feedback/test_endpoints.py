"""Several servers of one model: shares by weight, choice by content, failover when one cannot be reached."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from pydantic import ValidationError

from morlaif_ray.config.judging import OpenAIJudge
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.endpoints import cooled_last, endpoint_order
from morlaif_ray.feedback.judges import build_client
from morlaif_ray.feedback.parsing import parse_answer
from tests.fake_openai.server import KEY, FakeOpenAI, true_log_odds

pytestmark = pytest.mark.unit
URLS = ["http://a/v1", "http://b/v1", "http://c/v1"]
CLOSED = "http://127.0.0.1:9/v1"


def test_the_first_choice_follows_the_weights() -> None:
    firsts = Counter(endpoint_order(f"q{i}", URLS, [1.0, 2.0, 1.0], 0)[0] for i in range(4000))
    # Standard deviation of a share of 0.5 over 4000 draws: 0.8%.
    assert [firsts[i] / 4000 for i in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_the_choice_depends_on_content_and_seed_not_on_the_order_of_asking() -> None:
    weights = [1.0, 1.0, 1.0]
    once = [endpoint_order(f"q{i}", URLS, weights, 0) for i in range(50)]
    again = [endpoint_order(f"q{i}", URLS, weights, 0) for i in reversed(range(50))]
    assert once == again[::-1]
    assert once != [endpoint_order(f"q{i}", URLS, weights, 1) for i in range(50)]


def test_taking_a_server_away_moves_only_its_own_questions() -> None:
    for i in range(100):
        order = endpoint_order(f"q{i}", URLS, [1.0, 1.0, 1.0], 0)
        without = endpoint_order(f"q{i}", URLS[:2], [1.0, 1.0], 0)
        assert without == [index for index in order if index != 2]


def test_a_server_that_was_down_a_moment_ago_comes_last() -> None:
    assert cooled_last([2, 0, 1], [0.0, 0.0, 50.0], now_s=20.0) == [0, 1, 2]
    assert cooled_last([2, 0, 1], [0.0, 0.0, 50.0], now_s=50.0) == [2, 0, 1]


def ask_all(judge: OpenAIJudge, count: int) -> list[RawAnswer]:
    async def work() -> list[RawAnswer]:
        client = build_client(judge, seed=0)
        questions = [
            Question(
                f"\n\nHuman: {i}\n\nAssistant:", " one two", " x", "d", "D?", "ab", bytes([i] * 16)
            )
            for i in range(count)
        ]
        try:
            return [await client.ask(question) for question in questions]
        finally:
            await client.close()

    return asyncio.run(work())


def several(*urls: str) -> OpenAIJudge:
    endpoints = [{"base_url": url, "api_key_env": "TEST_JUDGE_KEY"} for url in urls]
    return OpenAIJudge.model_validate({"model": "m", "endpoints": endpoints})


def test_two_servers_share_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with FakeOpenAI() as left, FakeOpenAI() as right:
        ask_all(several(left.url, right.url), 16)
        assert left.num_answered + right.num_answered == 16
        assert min(left.num_answered, right.num_answered) >= 1


def test_a_server_that_cannot_be_reached_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with FakeOpenAI() as server:
        answers = ask_all(several(CLOSED, server.url), 8)
        assert server.num_answered == 8
    expected = [true_log_odds(" one two", " x")] * 8
    assert [parse_answer(answer).log_odds for answer in answers] == pytest.approx(expected)


def test_an_error_that_is_no_lost_connection_is_not_carried_to_the_next_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "sk-wrong")
    with FakeOpenAI() as left, FakeOpenAI() as right:
        with pytest.raises(AttemptError, match="auth"):
            ask_all(several(left.url, right.url), 1)
        assert len(left.bodies) + len(right.bodies) == 1


def test_a_connection_lost_after_the_request_had_left_is_told_and_the_next_attempt_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    question = Question("\n\nHuman: q\n\nAssistant:", " one two", " x", "d", "D?", "ab", b"k" * 16)

    async def work(judge: OpenAIJudge) -> list[str]:
        client = build_client(judge, seed=0)
        doubts = []
        try:
            for _ in range(2):
                with pytest.raises(AttemptError) as caught:
                    await client.ask(question)
                doubts.append(caught.value.doubt)
            return doubts
        finally:
            await client.close()

    with FakeOpenAI() as left, FakeOpenAI() as right:
        left.faults.append("reset")
        right.faults.append("reset")
        doubts = asyncio.run(work(several(left.url, right.url)))
        assert (
            doubts == ["no readable answer (connection)"] * 2
        )  # each may be billed: none is passed over in silence
        assert [len(left.bodies), len(right.bodies)] == [1, 1]


def test_with_every_server_away_the_last_ones_error_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with pytest.raises(AttemptError, match=r"connection: http://127\.0\.0\.1:9/v1") as caught:
        ask_all(several(CLOSED, CLOSED.replace("127.0.0.1", "localhost")), 1)
    assert caught.value.kind == "connection"


def test_each_endpoints_key_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_JUDGE_KEY", raising=False)
    with pytest.raises(FeedbackError, match="TEST_JUDGE_KEY is not set"):
        build_client(several(CLOSED), seed=0)


def test_an_endpoint_named_twice_or_beside_base_url_is_refused() -> None:
    with pytest.raises(ValidationError, match="twice; give it once with a larger weight"):
        several(CLOSED, CLOSED)
    with pytest.raises(ValidationError, match="base_url or endpoints, not both"):
        OpenAIJudge.model_validate(
            {"model": "m", "base_url": "http://a/v1", "endpoints": [{"base_url": "http://b/v1"}]}
        )
