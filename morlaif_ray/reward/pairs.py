"""The inputs of the weight fit: cached PM scores of response pairs, and the judge's own log-odds.

Legend: N pairs, K principles, J baselines. Missing is NaN here too; pairs that lack a score or a label are left out by
`complete()` and counted, never filled in.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from morlaif_ray.artifacts import read_json, read_records, read_table
from morlaif_ray.errors import ArtifactError, DataError
from morlaif_ray.reward.normaliser import Normaliser
from morlaif_ray.types import BoolArray, FloatArray, Judgement, ResponsePair

BASELINE_PREFIX = "baseline_"


@dataclass(frozen=True, slots=True, eq=False)
class PairScores:
    """Raw scores of both responses of N pairs. Produced by stage 3, consumed by the fit and the sweep."""

    principles: tuple[str, ...]
    baselines: tuple[str, ...]
    pair_ids: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    """The unit of every bootstrap: pairs of one prompt are drawn together."""
    labels_N: FloatArray
    """1.0 where a person preferred response a, 0.0 where b, NaN where no one was asked."""
    scores_a_NK: FloatArray
    scores_b_NK: FloatArray
    baseline_a_NJ: FloatArray
    baseline_b_NJ: FloatArray

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def differences_NK(self) -> FloatArray:
        """Raw score of a minus that of b."""
        return self.scores_a_NK - self.scores_b_NK

    @property
    def labelled_N(self) -> BoolArray:
        return np.asarray(~np.isnan(self.labels_N))

    @property
    def scored_N(self) -> BoolArray:
        """True where every principle and baseline has a score for both responses."""
        columns = (self.scores_a_NK, self.scores_b_NK, self.baseline_a_NJ, self.baseline_b_NJ)
        return np.asarray(~np.isnan(np.concatenate(columns, axis=1)).any(axis=1))

    def complete(self) -> PairScores:
        """The pairs with a label and all scores: one set of pairs for everything that is compared."""
        return self.select(np.logical_and(self.labelled_N, self.scored_N))

    def select(self, keep_N: BoolArray) -> PairScores:
        rows = np.flatnonzero(keep_N)
        return PairScores(
            principles=self.principles,
            baselines=self.baselines,
            pair_ids=tuple(self.pair_ids[row] for row in rows),
            prompt_ids=tuple(self.prompt_ids[row] for row in rows),
            labels_N=self.labels_N[rows],
            scores_a_NK=self.scores_a_NK[rows],
            scores_b_NK=self.scores_b_NK[rows],
            baseline_a_NJ=self.baseline_a_NJ[rows],
            baseline_b_NJ=self.baseline_b_NJ[rows],
        )


@dataclass(frozen=True, slots=True, eq=False)
class RewardInputs:
    """Everything that stage `4_reward` reads."""

    normaliser: Normaliser
    weights: PairScores
    """Split `weights`: fits. No preference model was trained on these pairs."""
    test: PairScores
    """Split `test`: reports."""
    judge_odds: Mapping[str, Mapping[str, float]]
    """Pair id -> principle -> the judge's log-odds (nats) that a is better; absent where unusable."""
    num_judgements: Mapping[str, int]
    """Model (principle or baseline) -> judgements that it was trained on."""


def read_reward_inputs(run_dir: Path) -> RewardInputs:
    """Reads stages 1-3 of a run folder. ArtifactError or DataError names the file and what is wrong."""
    models = run_dir / "3_preference_models"
    panel = read_json(models / "panel.json")
    try:
        principles, baselines = tuple(panel["principles"]), tuple(panel["baselines"])
        normaliser = Normaliser.from_json(panel["normaliser"], principles)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{models / 'panel.json'}: damaged or of another version ({error!r})"
        ) from None
    prompts = read_prompt_ids(run_dir)
    judgements = read_records(run_dir / "2_feedback" / "judgements.parquet", Judgement)
    return RewardInputs(
        normaliser=normaliser,
        weights=read_pair_scores(models / "scores_weights.parquet", principles, baselines, prompts),
        test=read_pair_scores(models / "scores_test.parquet", principles, baselines, prompts),
        judge_odds=collect_odds(judgements, principles),
        num_judgements=_read_num_judgements(models / "accuracy.csv"),
    )


def read_prompt_ids(run_dir: Path) -> dict[str, str]:
    """Pair id -> prompt id, from stage 1."""
    pairs = read_records(run_dir / "1_pairs" / "pairs.parquet", ResponsePair)
    return {pair.pair_id: pair.prompt_id for pair in pairs}


def read_pair_scores(
    path: Path, principles: Sequence[str], baselines: Sequence[str], prompts: Mapping[str, str]
) -> PairScores:
    """Reads one `scores_*.parquet`. A pair whose prompt is unknown counts as a prompt of its own."""
    table = read_table(path)
    pair_ids = tuple(str(value) for value in _column(table, "pair_id", path))
    labels_N = np.array(_column(table, "human_label", path), dtype=np.float64)
    wrong = np.flatnonzero(~np.isnan(labels_N) & (labels_N != 0.0) & (labels_N != 1.0))
    if len(wrong):
        raise DataError(
            f"{path}: row {wrong[0]} has human_label {labels_N[wrong[0]]}; it must be 1 (a preferred), "
            f"0 (b preferred) or empty"
        )
    columns = [f"{BASELINE_PREFIX}{name}" for name in baselines]
    return PairScores(
        principles=tuple(principles),
        baselines=tuple(baselines),
        pair_ids=pair_ids,
        prompt_ids=tuple(prompts.get(pair_id, pair_id) for pair_id in pair_ids),
        labels_N=labels_N,
        scores_a_NK=_matrix(table, "a_", principles, path),
        scores_b_NK=_matrix(table, "b_", principles, path),
        baseline_a_NJ=_matrix(table, "a_", columns, path),
        baseline_b_NJ=_matrix(table, "b_", columns, path),
    )


def collect_odds(
    judgements: Sequence[Judgement], principles: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Usable log-odds by pair and principle; other questions ("general", "random") are left out."""
    wanted = set(principles)
    odds: dict[str, dict[str, float]] = {}
    for item in judgements:
        if item.principle in wanted and not np.isnan(item.log_odds):
            odds.setdefault(item.pair_id, {})[item.principle] = item.log_odds
    return odds


def odds_matrix(inputs: RewardInputs, pairs: PairScores) -> FloatArray:
    """The judge's log-odds [N, K] of these pairs, NaN where it gave none."""
    nan = float("nan")
    rows = [inputs.judge_odds.get(pair_id, {}) for pair_id in pairs.pair_ids]
    return np.array(
        [[row.get(name, nan) for name in pairs.principles] for row in rows], dtype=np.float64
    ).reshape(len(rows), len(pairs.principles))


def _matrix(
    table: Mapping[str, list[Any]], prefix: str, names: Sequence[str], path: Path
) -> FloatArray:
    num_rows = len(_column(table, "pair_id", path))
    columns = [
        np.array(_column(table, f"{prefix}{name}", path), dtype=np.float64) for name in names
    ]
    if not columns:
        return np.zeros((num_rows, 0))
    return np.stack(columns, axis=1)


def _column(table: Mapping[str, list[Any]], name: str, path: Path) -> list[Any]:
    if name not in table:
        raise ArtifactError(
            f"{path}: column '{name}' is missing; run train_preference_models again"
        )
    return table[name]


def _read_num_judgements(path: Path) -> dict[str, int]:
    """Training judgements per model from `accuracy.csv` (baselines with or without their prefix)."""
    if not path.is_file():
        raise ArtifactError(f"{path}: missing; run the stage that makes it first")
    with path.open(newline="", encoding="utf-8") as stream:
        return {
            row["model"].removeprefix(BASELINE_PREFIX): int(float(row["num_judgements"]))
            for row in csv.DictReader(stream)
            if row.get("num_judgements")
        }
