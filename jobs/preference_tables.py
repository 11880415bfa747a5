"""Tables of stage 3: accuracy, calibration and length correlation of every preference model on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from morlaif_ray.artifacts import read_table
from morlaif_ray.config import Config
from morlaif_ray.evaluation.statistics import mean_interval, pearson
from morlaif_ray.preference.calibration import fit_temperature, measure_calibration
from morlaif_ray.preference.labels import LogOddsTable, targets
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import FloatArray, ResponsePair

NUM_RESAMPLES = 200
"""Behind the intervals of calibration errors."""


def accuracy_rows(
    work: Path,
    card: dict[str, Any],
    pairs: Sequence[ResponsePair],
    table: LogOddsTable,
    config: Config,
) -> list[dict[str, Any]]:
    """Accuracy of every model on the test split, against its own judge and against people; ties left out."""
    scores = read_table(work / "scores_test.parquet")
    place = {pair_id: index for index, pair_id in enumerate(table.pair_ids)}
    rows_in_table = [place[pair_id] for pair_id in scores["pair_id"]]
    human = np.array(scores["human_label"], dtype=np.float64)
    reference = read_table(work / "scores_reference.parquet")
    words = np.array([len(text.split()) for text in reference["response"]], dtype=np.float64)
    used = num_judgements(pairs, table, card)
    records = []
    for name, kind in _models(card):
        difference = np.array(scores[f"a_{name}"]) - np.array(scores[f"b_{name}"])
        log_odds = table.column(_label_column(name, table, card))[rows_in_table]
        log_odds = np.where(np.abs(log_odds) < config.feedback.tie_threshold, np.nan, log_odds)
        labels = {
            "judge": np.where(np.isnan(log_odds), np.nan, (log_odds > 0).astype(float)),
            "human": human,
        }
        for label, truth in labels.items():
            seen = ~np.isnan(truth)
            if not seen.any():
                continue
            hit = np.where(difference == 0, 0.5, (difference > 0) == (truth > 0.5))[seen]
            interval = mean_interval(hit, seed=config.seed, num_resamples=2000)
            records.append(
                {
                    "model": name,
                    "kind": kind,
                    "label": label,
                    "accuracy": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "num": interval.num,
                    "num_judgements": used[name],
                    "length_correlation": pearson(np.array(reference[name]), words),
                }
            )
    return records


def num_judgements(
    pairs: Sequence[ResponsePair], table: LogOddsTable, card: dict[str, Any]
) -> dict[str, int]:
    """Judgements behind each model's training labels: baselines are compared with that price stated.

    `mean_log_odds` uses all K judgements of a pair; `human_labels` uses people's choices and no judgement.
    """
    rows = [index for index, pair in enumerate(pairs) if pair.split == "preference"]
    present = {name: int((~np.isnan(table.column(name)[rows])).sum()) for name in table.columns}
    counts = {name: present[name] for name in card["principles"]}
    for name, entry in card["baselines"].items():
        if name == "mean_log_odds":
            counts[f"baseline_{name}"] = sum(present[principle] for principle in card["principles"])
        elif name == "human_labels":
            counts[f"baseline_{name}"] = 0
        else:
            counts[f"baseline_{name}"] = present[entry.get("principle", f"baseline_{name}")]
    return counts


def calibration_rows(
    work: Path,
    card: dict[str, Any],
    pairs: Sequence[ResponsePair],
    table: LogOddsTable,
    seed: int,
) -> list[dict[str, Any]]:
    """Temperature of every model from split `weights`, and its calibration error on split `test` before and after.

    The label is what the model was trained to predict: the judge's probability, or (`human_labels`) people's choice.
    """
    place = {pair_id: index for index, pair_id in enumerate(table.pair_ids)}
    prompt_of = {pair.pair_id: pair.prompt_id for pair in pairs}
    scores = {split: read_table(work / f"scores_{split}.parquet") for split in ("weights", "test")}
    rows = {name: [place[pair_id] for pair_id in part["pair_id"]] for name, part in scores.items()}
    prompts = [prompt_of[pair_id] for pair_id in scores["test"]["pair_id"]]
    records = []
    for name, kind in _models(card):
        column = _label_column(name, table, card)

        def of(split: str, name: str = name, column: str = column) -> tuple[FloatArray, FloatArray]:
            part = scores[split]
            difference = np.array(part[f"a_{name}"], dtype=np.float64) - np.array(part[f"b_{name}"])
            labels, _ = targets(table.column(column)[rows[split]], "soft_label")
            return difference, labels

        fitted, labels_fitted = of("weights")
        difference, labels = of("test")
        temperature = fit_temperature(fitted, labels_fitted)
        before = measure_calibration(difference, labels)
        after = measure_calibration(difference, labels, temperature)
        low, high = _error_interval(difference, labels, prompts, derive_seed(seed, "calibration"))
        records.append(
            {
                "model": name,
                "kind": kind,
                "temperature": temperature,
                "num_fitted": int((~np.isnan(labels_fitted)).sum()),
                "error_before": before.error,
                "error_before_low": low,
                "error_before_high": high,
                "error_after": after.error,
                "log_loss_before": before.log_loss,
                "log_loss_after": after.log_loss,
                "num": before.num,
            }
        )
    return records


def _error_interval(
    difference: FloatArray, labels: FloatArray, prompts: Sequence[str], seed: int
) -> tuple[float, float]:
    """95% bootstrap interval over prompts. The error is biased upwards on few pairs, and so is its interval."""
    members: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        if not np.isnan(labels[row]):
            members.setdefault(prompt, []).append(row)
    if not members:
        return float("nan"), float("nan")
    groups = [np.array(rows) for rows in members.values()]
    rng = np.random.default_rng(seed)
    errors = []
    for _ in range(NUM_RESAMPLES):
        drawn = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        errors.append(measure_calibration(difference[drawn], labels[drawn]).error)
    low, high = np.percentile(errors, [2.5, 97.5])
    return float(low), float(high)


def _models(card: dict[str, Any]) -> list[tuple[str, str]]:
    """(column of the score tables, kind) of every principle and baseline."""
    return [(name, "principle") for name in card["principles"]] + [
        (f"baseline_{name}", "baseline") for name in card["baselines"]
    ]


def _label_column(name: str, table: LogOddsTable, card: dict[str, Any]) -> str:
    """The judgements that a model was trained on."""
    if name in table.columns:
        return name
    return str(card["baselines"]["best_principle"]["principle"])
