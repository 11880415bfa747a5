"""Puts a plan's questions to the judge of section `feedback`: through the pool of workers, or the Batch API.

pairs -> PairBatch -> FeedbackPool (actors) or BatchCollector (files) -> BatchOutcome, in the order of the pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.context import JobContext
from morlaif_ray.artifacts import canonical_json
from morlaif_ray.feedback.asking import BatchOutcome
from morlaif_ray.feedback.judges import judge_identity
from morlaif_ray.feedback.prompting import prompter_for
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan, split_batches
from morlaif_ray.types import ResponsePair


def ask_judge(
    context: JobContext,
    pairs: Sequence[ResponsePair],
    plan: QuestionPlan,
    ledger_path: Path,
    *,
    title: str = "AI feedback",
    progress_path: Path | None = None,
) -> tuple[list[PairBatch], list[BatchOutcome]]:
    """Answers from the ledger where they are recorded, else from the judge. FeedbackError, ActorLostError."""
    if context.config.feedback.judge.kind == "openai_batch":
        return _through_files(context, pairs, plan, ledger_path, title)
    from actors.feedback_pool import QUESTIONS_PER_BATCH, FeedbackPool
    from actors.ledger_writer import LedgerRecipe

    config = context.config
    batches = list(split_batches(pairs, plan, QUESTIONS_PER_BATCH))
    identity = canonical_json(judge_identity(config.feedback.judge, config.seed))
    context.connect()
    pool = FeedbackPool(
        config.feedback,
        plan,
        ledger_path,
        LedgerRecipe(plan.recipe, identity, prompter_for(config.feedback).describe()),
        seed=config.seed,
        start_timeout_s=config.cluster.start_timeout_s,
        progress_path=progress_path,
    )
    with pool:
        _tell_recorded(context, pool.num_recorded_before)
        total = len(pairs) * plan.per_pair
        with context.reporter.task(title, total=total, unit="questions") as task:
            outcomes = pool.answer(batches, task.advance)
    return batches, outcomes


def _through_files(
    context: JobContext,
    pairs: Sequence[ResponsePair],
    plan: QuestionPlan,
    ledger_path: Path,
    title: str,
) -> tuple[list[PairBatch], list[BatchOutcome]]:
    from actors.feedback_pool import QUESTIONS_PER_BATCH
    from morlaif_ray.feedback.openai_batch import BatchCollector

    config = context.config
    batches = list(split_batches(pairs, plan, QUESTIONS_PER_BATCH))
    with BatchCollector(
        config.feedback, plan, ledger_path, seed=config.seed, tell=context.reporter.line
    ) as collector:
        _tell_recorded(context, collector.num_recorded_before)
        total = len(pairs) * plan.per_pair
        with context.reporter.task(title, total=total, unit="questions") as task:
            outcomes = collector.answer(batches, task.advance)
    return batches, outcomes


def _tell_recorded(context: JobContext, number: int) -> None:
    if number:
        context.reporter.line(f"ledger: {number} answers recorded before are not asked again")
