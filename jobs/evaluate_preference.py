"""Job `evaluate_preference`: accuracy of a run's preference models and rewards on labelled pairs, by subset.

    morlaif evaluate_preference --run-dir RUN --data reward_bench.parquet

Reads stages 3 and 4 of a finished run and RewardBench's format (`prompt`, `chosen`, `rejected`, `subset`); leaves
`preference_evaluation/<name of the data>/accuracy.csv` in the run folder. Publishes no stage.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from jobs.context import JobContext
from morlaif_ray.artifacts import read_json, write_csv, write_json
from morlaif_ray.backbone.dialogue import dialogue_text
from morlaif_ray.data.rewardbench import SubsetPairs, read_rewardbench
from morlaif_ray.errors import ArtifactError
from morlaif_ray.evaluation.subsets import ALL, Rewarded, subset_rows
from morlaif_ray.reward.function import RewardFunction
from morlaif_ray.reward.scalarizers import SCALARIZERS
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import FloatArray

FOLDER = "preference_evaluation"
MODELS = "3_preference_models"
BATCH = 2048


def run(context: JobContext, data: str, split: str) -> None:
    """Scores the data and writes the table. Data and run folder are checked before a model is loaded."""
    panel_path = context.path(MODELS, "panel.json")
    if not panel_path.is_file():
        raise ArtifactError(
            f"{panel_path}: missing; run 'morlaif train_preference_models' on this run folder first"
        )
    loaded = read_rewardbench(data, split)
    card = read_json(panel_path)
    chosen, rejected, names = _scores(context, loaded, list(card["baselines"]))
    rewards = [
        Rewarded(name, kind, chosen[:, at], rejected[:, at])
        for at, (name, kind) in enumerate(names)
    ]
    rewards += _scalarized(context, len(card["principles"]), chosen, rejected)
    rewards.append(_length_control(loaded))
    rows = subset_rows(
        rewards,
        [pair.subset for pair in loaded.pairs],
        [pair.prompt for pair in loaded.pairs],
        seed=derive_seed(context.config.seed, FOLDER),
    )
    folder = context.path(FOLDER, _folder_name(data))
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "accuracy.csv", rows)
    summary = {"data": data, "num_pairs": len(loaded.pairs), "num_identical": loaded.num_identical}
    write_json(folder / "summary.json", summary)
    for row in rows:
        if row["subset"] == ALL:
            context.reporter.line(
                f"  {row['model']} ({row['kind']}): {row['accuracy']:.3f} [{row['low']:.3f}, "
                f"{row['high']:.3f}] on {row['num_pairs']} pairs"
            )
    context.reporter.line(f"by subset: {folder / 'accuracy.csv'}")


def _scores(
    context: JobContext, loaded: SubsetPairs, baselines: list[str]
) -> tuple[FloatArray, FloatArray, list[tuple[str, str]]]:
    """Raw scores [N, columns] of chosen and rejected responses, and (name, kind) of the columns."""
    from actors.preference_panel import PreferencePanel, panel_columns

    columns = panel_columns(context.path(MODELS), baselines)
    texts = {
        "chosen": [dialogue_text(pair.prompt, pair.chosen) for pair in loaded.pairs],
        "rejected": [dialogue_text(pair.prompt, pair.rejected) for pair in loaded.pairs],
    }
    context.connect()
    panel = PreferencePanel(context.config, columns, context.reporter.line)
    scores: dict[str, FloatArray] = {}
    with context.reporter.task("scores", total=2 * len(loaded.pairs), unit="texts") as task:
        for side, batch in texts.items():
            parts = []
            for start in range(0, len(batch), BATCH):
                parts.append(panel.score(batch[start : start + BATCH]).scores_BK)
                task.advance(len(parts[-1]))
            scores[side] = np.concatenate(parts)
    names = [
        (c.name, "baseline" if c.name.startswith("baseline_") else "principle")
        for c in panel.columns
    ]
    panel.close()
    return scores["chosen"], scores["rejected"], names


def _scalarized(
    context: JobContext, num_principles: int, chosen: FloatArray, rejected: FloatArray
) -> list[Rewarded]:
    """Every scalarizer with the run's weights; none, with a line, where stage 4 has not run."""
    path = context.path("4_reward", "weights.json")
    if not path.is_file():
        context.reporter.line("stage 4_reward has not run: principles and baselines only")
        return []
    found = []
    for name in SCALARIZERS:
        reward = RewardFunction.from_artifacts(path, name, context.config.reward)
        found.append(
            Rewarded(
                name,
                "scalarizer",
                reward(chosen[:, :num_principles]).reward_B,
                reward(rejected[:, :num_principles]).reward_B,
            )
        )
    return found


def _length_control(loaded: SubsetPairs) -> Rewarded:
    """What counting words alone would reach: a model near it may have learned nothing else."""
    chosen = np.array([float(len(pair.chosen.split())) for pair in loaded.pairs])
    rejected = np.array([float(len(pair.rejected.split())) for pair in loaded.pairs])
    return Rewarded("number_of_words", "control", chosen, rejected)


def _folder_name(data: str) -> str:
    """`reward-bench` of `some/path/reward-bench.parquet` and of a hub id."""
    name = Path(data).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]", "_", name) or "data"
