"""Job `fit_weights`: stage `4_reward` - weights with intervals, ceiling, accuracy per scalarizer, ablation.

Reads the cached scores of stage 3, so it loads no model and needs no Ray.
"""

from __future__ import annotations

from pathlib import Path

from jobs.context import JobContext
from morlaif_ray.artifacts import read_records
from morlaif_ray.reward.fit import RewardFit, fit_reward, write_reward
from morlaif_ray.reward.pairs import read_reward_inputs
from morlaif_ray.types import ResponsePair

STAGE = "4_reward"


def run(context: JobContext) -> None:
    """Publishes `4_reward` unless it is up to date."""
    stage = context.stage(
        STAGE, sections=["reward"], inputs=["1_pairs", "2_feedback", "3_preference_models"]
    )
    if stage.is_current():
        context.reporter.skipped(STAGE)
        return
    bayes = (
        _bayes_accuracy(context.run_dir, context.config.seed) if context.config.on_testbed else None
    )
    inputs = read_reward_inputs(context.run_dir)
    with context.reporter.task("weights", total=1, unit="fits") as task:
        fit = fit_reward(
            inputs, context.config.reward, seed=context.config.seed, bayes_accuracy=bayes
        )
        task.advance(1)
    rows: dict[str, int] = {}
    with stage.writing(rows) as folder:
        rows.update(write_reward(folder, fit))
    for line in (*fit.notes, *summarise(fit)):
        context.reporter.line(f"{STAGE}: {line}")


def summarise(fit: RewardFit) -> list[str]:
    """What a person wants to know of the stage: the best of each kind, with its interval."""
    lines = []
    for kind in ("scalarizer", "baseline", "ceiling", "bayes"):
        rows = [row for row in fit.scalarizers if row["kind"] == kind]
        if rows:
            best = max(rows, key=lambda row: float(row["accuracy"]))
            name = best["name"] if best["name"] == kind else f"best {kind} {best['name']}"
            lines.append(
                f"{name}: accuracy {best['accuracy']:.3f} [{best['low']:.3f}, {best['high']:.3f}] "
                f"on {best['num']} held-out prompts"
            )
    return lines


def _bayes_accuracy(run_dir: Path, seed: int) -> dict[str, float]:
    """Pair id -> what the best possible rule scores on that pair's noisy label (test-bed: the truth is known)."""
    from morlaif_ray.testbed import human_preference

    pairs = read_records(run_dir / "1_pairs" / "pairs.parquet", ResponsePair)
    best: dict[str, float] = {}
    for pair in pairs:
        if pair.split == "test":
            p = human_preference(pair.prompt, pair.response_a, pair.response_b, seed).probability
            best[pair.pair_id] = max(p, 1.0 - p)
    return best
