"""Runs of the Batch API judge against the fake provider, and the labels that must come of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.feedback.batch_provider import OpenAIBatchProvider
from morlaif_ray.feedback.judges import recipe_for
from morlaif_ray.feedback.openai_batch import BatchCollector
from morlaif_ray.feedback.questions import QuestionPlan, split_batches
from morlaif_ray.feedback.recording import BatchOutcome
from tests.fake_openai.batches import FakeBatchAPI
from tests.unit.feedback.fakes import make_pairs, words_difference

NAMES = (("detail", "More detail?"), ("kind", "Kinder?"), ("general", "Better?"))


def feedback(api: FakeBatchAPI, judge: dict[str, object] | None = None, **rest: object):  # type: ignore[no-untyped-def]
    values = {
        "kind": "openai_batch",
        "model": "m",
        "base_url": api.url,
        "api_key_env": "TEST_JUDGE_KEY",
        "poll_s": 0.01,
    }
    return FeedbackConfig.model_validate({"judge": values | (judge or {}), **rest})


def plan_of(config: FeedbackConfig, names: tuple[tuple[str, str], ...] = NAMES) -> QuestionPlan:
    return QuestionPlan(names, "both", 0, recipe_for(config, 0), config.joint)


def collect(
    config: FeedbackConfig,
    folder: Path,
    pairs: int = 4,
    *,
    sleep: Callable[[float], None] = lambda _: None,
    provider: OpenAIBatchProvider | None = None,
    progress: Callable[[int], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[BatchOutcome]:
    plan = plan_of(config)
    batches = list(split_batches(make_pairs(pairs), plan, 12))
    with BatchCollector(
        config,
        plan,
        folder / "feedback.sqlite",
        seed=0,
        sleep=sleep,
        provider=provider,
        tell=tell,
        lock_wait_s=0.2,
    ) as collector:
        return collector.answer(batches, progress)


def expected(config: FeedbackConfig, pairs: int = 4) -> list[float]:
    plan = plan_of(config)
    questions = [q for pair in make_pairs(pairs) for q in plan.questions(pair)]
    return [0.5 * words_difference(question) + 0.7 for question in questions]


def labels(outcomes: list[BatchOutcome]) -> list[float]:
    return [value for outcome in outcomes for value in outcome.log_odds_N.tolist()]


def inputs(api: FakeBatchAPI) -> list[bytes]:
    return [api.files[batch["input_file_id"]] for batch in api.batches.values()]
