"""Puts a plan's questions to the judge of section `feedback`: through the pool of workers, or the Batch API.

pairs -> PairBatch -> FeedbackPool (actors) or BatchCollector (files) -> BatchOutcome, in the order of the pairs
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.context import JobContext
from morlaif_ray.artifacts import canonical_json, write_json
from morlaif_ray.feedback.asking import BatchOutcome
from morlaif_ray.feedback.fewshot import with_examples_inlined
from morlaif_ray.feedback.judges import judge_identity
from morlaif_ray.feedback.prompting import prompter_for
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan, split_batches
from morlaif_ray.feedback.status import Progress
from morlaif_ray.types import ResponsePair

if TYPE_CHECKING:
    from morlaif_ray.feedback.openai_batch import BatchCollector

NOTE_EVERY_S = 10.0


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
        return _through_files(context, pairs, plan, ledger_path, title, progress_path)
    from actors.feedback_pool import QUESTIONS_PER_BATCH, FeedbackPool
    from actors.ledger_writer import LedgerRecipe

    config = context.config
    batches = list(split_batches(pairs, plan, QUESTIONS_PER_BATCH))
    identity = canonical_json(judge_identity(config.feedback.judge, config.seed))
    context.connect()
    pool = FeedbackPool(
        with_examples_inlined(config.feedback),
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
    progress_path: Path | None,
) -> tuple[list[PairBatch], list[BatchOutcome]]:
    from actors.feedback_pool import QUESTIONS_PER_BATCH
    from morlaif_ray.feedback.openai_batch import BatchCollector

    config = context.config
    batches = list(split_batches(pairs, plan, QUESTIONS_PER_BATCH))
    note = _Note(progress_path, plan.recipe, len(pairs) * plan.per_pair)
    with BatchCollector(
        config.feedback,
        plan,
        ledger_path,
        seed=config.seed,
        tell=context.reporter.line,
        sleep=note.sleep,
    ) as collector:
        _tell_recorded(context, collector.num_recorded_before)
        note.collector = collector
        with context.reporter.task(title, total=note.total, unit="questions") as task:

            def advance(count: int) -> None:
                task.advance(count)
                note.done += count

            try:
                outcomes = collector.answer(batches, advance)
            finally:
                note.write(running=False)
    return batches, outcomes


class _Note:
    """What `morlaif feedback status` shows of batches under way: written anew while the driver waits for them."""

    def __init__(self, path: Path | None, recipe: str, total: int) -> None:
        self._path = path
        self._recipe = recipe
        self._started_s = time.time()
        self.total = total
        self.done = 0
        self.collector: BatchCollector | None = None

    def sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            self.write()
            time.sleep(min(left_s, NOTE_EVERY_S))

    def write(self, *, running: bool = True) -> None:
        if self._path is None or self.collector is None:
            return
        progress = Progress(
            recipe=self._recipe,
            total=self.total,
            done=self.done + self.collector.num_failed,
            failed=self.collector.num_failed,
            recorded_before=self.collector.num_recorded_before,
            started_s=self._started_s,
            updated_s=time.time(),
            running=running,
            last_error="",
            condition=self.collector.condition(),
        )
        with contextlib.suppress(OSError):  # a note for people must not end a paid run
            write_json(self._path, dataclasses.asdict(progress))


def _tell_recorded(context: JobContext, number: int) -> None:
    if number:
        context.reporter.line(f"ledger: {number} answers recorded before are not asked again")
