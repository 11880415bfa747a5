"""Stage 2: ask the judge about every pair, per principle, in both orders.

    1_pairs/pairs.parquet -> FeedbackPool (ledger, limiter, workers) -> debias -> 2_feedback/

Ctrl-C or a crash at any time: the same command goes on from the ledger and pays for nothing twice.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jobs.ask_judge import ask_judge
from jobs.context import JobContext
from jobs.select_pairs import select_pairs, selection_recipe
from morlaif_ray.artifacts import (
    explain_os_errors,
    read_records,
    write_csv,
    write_json,
    write_records,
    write_table,
)
from morlaif_ray.errors import DataError
from morlaif_ray.feedback.analysis import analysis_tables, summarise
from morlaif_ray.feedback.asking import BatchOutcome
from morlaif_ray.feedback.assembling import Assembled, assemble, check_missing
from morlaif_ray.feedback.combining import CombineRule
from morlaif_ray.feedback.joint import agreement_with_separate, check_sample
from morlaif_ray.feedback.judges import check_principles, recipe_for
from morlaif_ray.feedback.prices import price_for_budget
from morlaif_ray.feedback.prompting import count_truncated
from morlaif_ray.feedback.questions import (
    GENERAL,
    PairBatch,
    QuestionPlan,
    plan_questions,
    random_assignment,
)
from morlaif_ray.feedback.status import doubts_in_words
from morlaif_ray.principles import load_principles
from morlaif_ray.types import Judgement, ResponsePair

STAGE = "2_feedback"
ANSWERS = "answers.parquet"
PROGRESS = ("logs", "feedback_progress.json")
JUDGED_SPLITS = ("preference", "weights", "test")


def run(context: JobContext) -> None:
    config = context.config
    feedback = config.feedback
    principles = load_principles(feedback.principles, feedback.principles_dir)
    names = [principle.name for principle in principles]
    check_principles(feedback.judge, names)
    price_for_budget(feedback.judge, feedback.budget_usd, feedback.prices_file)
    # What files say is part of the recipe: an edited principle or example makes the stage stale.
    phrases = {principle.name: principle.question for principle in principles}
    extra = {"phrases": phrases, **selection_recipe(config)}
    recipe = recipe_for(feedback, config.seed)
    if isinstance(feedback.few_shot, Path) or feedback.tokenizer is not None:
        extra["prompt"] = recipe
    stage = context.stage(STAGE, sections=["feedback"], inputs=["1_pairs"], extra=extra)
    if stage.is_current():
        context.reporter.skipped(STAGE)
        return
    pairs = judgeable_pairs(context.path("1_pairs", "pairs.parquet"))
    plan = plan_questions(
        principles,
        orders=feedback.orders,
        seed=config.seed,
        recipe=recipe,
        joint=feedback.joint,
        strengths=feedback.joint_answer == "strength",
    )
    rule = CombineRule(feedback.tie_threshold, feedback.min_answer_mass)

    def judge(asked: Sequence[ResponsePair]) -> tuple[Assembled, list[BatchOutcome]]:
        batches, outcomes = _ask(context, asked, plan)
        assignment = random_assignment(asked, principles, config.seed)
        assembled = assemble(plan, batches, outcomes, rule, assignment)
        check_missing(assembled.judgements, feedback.max_missing_share)
        return assembled, outcomes

    selection = select_pairs(context, stage, pairs, names, lambda some: judge(some)[0].judgements)
    pairs = selection.pairs
    assignment = random_assignment(pairs, principles, config.seed)
    assembled, outcomes = judge(pairs)
    extras: dict[str, Any] = {"num_truncated": count_truncated(feedback, pairs)}
    if feedback.joint > 1:
        extras["joint_agreement"], more = _check_joint(context, pairs, plan, rule, assembled)
        outcomes = [*outcomes, *more]
    extras |= discounts(outcomes)
    rows = {"judgements.parquet": len(assembled.judgements)}
    with stage.writing(rows) as folder:
        write_stage(folder, pairs, assembled, outcomes, names, assignment, extras)
        selection.write(folder)
    shutil.rmtree(stage.work_dir, ignore_errors=True)
    write_answers(context, {pair.pair_id for pair in pairs}, recipe)
    for line in doubts_in_words(ledger_path(context)):
        context.reporter.line(line)


def discounts(outcomes: Sequence[BatchOutcome]) -> dict[str, float]:
    """What `cost_usd` is already less: the provider's prompt cache and the Batch API, stated apart."""
    cache_usd = math.fsum(outcome.cache_discount_usd for outcome in outcomes)
    batch_usd = math.fsum(outcome.batch_discount_usd for outcome in outcomes)
    return {
        "cached_tokens": sum(outcome.cached_tokens for outcome in outcomes),
        "cache_discount_usd": cache_usd,
        "batch_discount_usd": batch_usd,
    }


def ledger_path(context: JobContext) -> Path:
    """The ledger of this run: its own, or the shared one that the config names."""
    path = context.config.feedback.ledger_path or context.path("ledger", "feedback.sqlite")
    return path.absolute()


def write_answers(context: JobContext, pair_ids: Container[str], recipe: str) -> None:
    """`ledger/answers.parquet`, outside the published stage: latencies differ between equal runs."""
    from morlaif_ray.feedback.export import export_answers

    target = context.path("ledger", ANSWERS)
    temporary = target.with_name(f".{ANSWERS}.partial")
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        export_answers(ledger_path(context), temporary, pair_ids, recipe)
        temporary.replace(target)


def judgeable_pairs(path: Path) -> list[ResponsePair]:
    """The pairs to ask about. DataError where there are none, or where all responses are identical."""
    pairs = [pair for pair in read_records(path, ResponsePair) if pair.split in JUDGED_SPLITS]
    if not pairs:
        raise DataError(
            f"{path}: holds no pairs of the splits {', '.join(JUDGED_SPLITS)}; sample more prompts"
        )
    distinct = [pair for pair in pairs if pair.response_a != pair.response_b]
    if not distinct:
        raise DataError(
            f"{path}: in all {len(pairs)} pairs both responses are identical, so there is nothing to compare; "
            f"sample at a higher temperature or use other data"
        )
    return distinct


def _ask(
    context: JobContext, pairs: Sequence[ResponsePair], plan: QuestionPlan
) -> tuple[list[PairBatch], list[BatchOutcome]]:
    return ask_judge(
        context, pairs, plan, ledger_path(context), progress_path=context.path(*PROGRESS)
    )


def _check_joint(
    context: JobContext,
    pairs: Sequence[ResponsePair],
    plan: QuestionPlan,
    rule: CombineRule,
    joint: Assembled,
) -> tuple[dict[str, Any], list[BatchOutcome]]:
    """Asks a sample of the pairs separately too, in both orders; what it says goes into the summary alone."""
    config = context.config
    sample = check_sample(pairs, config.feedback.joint_check_share, config.seed)
    if not sample:
        return agreement_with_separate([], [], 0), []
    # "general" is asked alone in the main plan already: here it would be counted twice.
    asked = tuple(entry for entry in plan.principles if entry[0] != GENERAL)
    alone = replace(plan, principles=asked, joint=1, orders="both", strengths=False)
    batches, outcomes = _ask(context, sample, alone)
    separate = assemble(alone, batches, outcomes, rule, {})
    return agreement_with_separate(joint.judgements, separate.judgements, len(sample)), outcomes


def write_stage(
    folder: Path,
    pairs: Sequence[ResponsePair],
    assembled: Assembled,
    outcomes: Sequence[BatchOutcome],
    names: Sequence[str],
    assignment: dict[str, str],
    extras: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """The files of `2_feedback/` as docs/artifacts.md describes them."""
    judgements = assembled.judgements
    write_records(folder / "judgements.parquet", judgements, Judgement)
    write_table(
        folder / "random_assignment.parquet",
        {"pair_id": list(assignment), "principle": list(assignment.values())},
    )
    summary = summarise(pairs, judgements, outcomes, assembled.position_bias, names)
    write_json(folder / "summary.json", {**summary, **extras})
    for name, rows in analysis_tables(pairs, judgements, assembled.position_bias, names).items():
        write_csv(folder / name, rows)
