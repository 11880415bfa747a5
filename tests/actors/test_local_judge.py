"""A judge inside the workers: two of them, each with the model, answer every question once and as it would alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.feedback_pool import FeedbackPool
from actors.ledger_writer import LedgerRecipe
from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.errors import ConfigError
from morlaif_ray.feedback.judges import build_feedback_client
from morlaif_ray.feedback.parsing import parse_answer
from morlaif_ray.feedback.questions import split_batches
from tests.unit.feedback.fakes import PLAN, make_pairs
from tests.unit.feedback.tiny_judges import CHAT_TEMPLATE, make_letter_judge

pytestmark = pytest.mark.actors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letter_judge(
        tmp_path_factory.mktemp("judge") / "letters", chat_template=CHAT_TEMPLATE
    )


def pool_of(feedback: FeedbackConfig, path: Path) -> FeedbackPool:
    recipe = LedgerRecipe(PLAN.recipe, "{}", "template")
    return FeedbackPool(feedback, PLAN, path, recipe, seed=0, start_timeout_s=180.0)


def test_two_workers_answer_everything_once_and_a_second_run_asks_nothing(
    folder: Path, tmp_path: Path, ray_session: None
) -> None:
    judge = {"kind": "local", "model": str(folder), "batch_size": 8}
    feedback = FeedbackConfig.model_validate({"judge": judge, "num_workers": 2})
    pairs = make_pairs(12)
    batches = list(split_batches(pairs, PLAN, questions_per_batch=16))
    with pool_of(feedback, tmp_path / "feedback.sqlite") as pool:
        outcomes = pool.answer(batches)
        assert pool.num_recorded_before == 0
    found = [value for outcome in outcomes for value in outcome.log_odds_N.tolist()]
    client: Any = build_feedback_client(feedback, seed=0)
    questions = [question for pair in pairs for question in PLAN.questions(pair)]
    alone = [parse_answer(asyncio.run(client.ask(question))).log_odds for question in questions]
    assert found == pytest.approx(alone, abs=1e-4)
    assert {model for outcome in outcomes for model in outcome.models} == {client.version}
    with pool_of(feedback, tmp_path / "feedback.sqlite") as pool:
        again = pool.answer(batches)
    assert sum(outcome.num_recorded for outcome in again) == len(questions) == 48


def test_a_judge_that_cannot_read_so_much_ends_the_start_in_one_line(
    folder: Path, tmp_path: Path, ray_session: None
) -> None:
    judge = {"kind": "local", "model": str(folder), "max_length": 100_000}
    feedback = FeedbackConfig.model_validate({"judge": judge})
    with (
        pytest.raises(ConfigError, match="reads at most 1024 tokens"),
        pool_of(feedback, tmp_path / "feedback.sqlite") as pool,
    ):
        pool.answer(list(split_batches(make_pairs(2), PLAN, 16)))
