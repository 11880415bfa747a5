"""From judgements to training labels: one matrix per training, missing judgements as NaN.

Single-objective baselines (ALGORITHMS.md section 2) are columns like any principle, made of the same pairs:
random_principle = the judgement of one principle drawn per pair (Constitutional AI, Bai et al. 2022),
general_principle = one overall question, mean_log_odds = mean of the K judgements, human_labels = what people chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from morlaif_ray.errors import DataError
from morlaif_ray.types import FloatArray, Judgement, ResponsePair

JUDGED_BASELINES = {"random_principle": "random", "general_principle": "general"}


@dataclass(frozen=True)
class LogOddsTable:
    """Log-odds that response_a is better: [N pairs, C columns], NaN = missing."""

    pair_ids: tuple[str, ...]
    columns: tuple[str, ...]
    values_NC: FloatArray

    def column(self, name: str) -> FloatArray:
        return self.values_NC[:, self.columns.index(name)]


def log_odds_table(
    pairs: Sequence[ResponsePair],
    judgements: Sequence[Judgement],
    principles: Sequence[str],
    baselines: Sequence[str] = (),
) -> LogOddsTable:
    """One row per pair; columns: the principles, then `baseline_<name>` for every wanted trained baseline.

    A pair that the judge was never asked about (`feedback.select`) has no human label here either: baselines are made
    of the same pairs.
    """
    rows = {pair.pair_id: index for index, pair in enumerate(pairs)}
    asked = [*principles, "random", "general"]
    place = {name: index for index, name in enumerate(asked)}
    table = np.full((len(pairs), len(asked)), np.nan)
    judged = np.zeros(len(pairs), dtype=np.bool_)
    for judgement in judgements:
        row, column = rows.get(judgement.pair_id), place.get(judgement.principle)
        if row is not None and column is not None:
            table[row, column] = judgement.log_odds
            judged[row] = True
    num = len(principles)
    columns = list(principles)
    parts = [table[:, :num]]
    for baseline in baselines:
        if baseline == "best_principle":
            continue  # points at one of the principles' own models
        columns.append(f"baseline_{baseline}")
        column_N = _baseline_column(baseline, table, num, pairs)
        parts.append(np.where(judged, column_N, np.nan)[:, None])
    return LogOddsTable(tuple(rows), tuple(columns), np.concatenate(parts, axis=1))


def _baseline_column(
    baseline: str, table: FloatArray, num_principles: int, pairs: Sequence[ResponsePair]
) -> FloatArray:
    if baseline == "random_principle":
        return table[:, num_principles]
    if baseline == "general_principle":
        return table[:, num_principles + 1]
    if baseline == "mean_log_odds":
        present = ~np.isnan(table[:, :num_principles])
        total = np.where(present, table[:, :num_principles], 0.0).sum(axis=1)
        count = present.sum(axis=1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)
    human = np.array([pair.human_label for pair in pairs])
    return np.where(np.isnan(human), np.nan, np.where(human > 0.5, np.inf, -np.inf))


def targets(log_odds_NC: FloatArray, loss: str) -> tuple[FloatArray, FloatArray]:
    """(labels, margins) of the same shape: soft labels with margin 0, or hard labels with margin |log-odds|.

    Infinite log-odds (human labels) are hard labels without margin under either loss.
    """
    finite = np.isfinite(log_odds_NC)
    missing = np.isnan(log_odds_NC)
    with np.errstate(over="ignore", invalid="ignore"):
        soft = 1.0 / (1.0 + np.exp(-log_odds_NC))
    hard = (log_odds_NC > 0).astype(np.float64)
    if loss == "soft_label":
        labels, margins = soft, np.zeros_like(soft)
    else:
        labels = np.where(log_odds_NC == 0, 0.5, hard)
        margins = np.where(finite, np.abs(np.where(finite, log_odds_NC, 0.0)), 0.0)
    return np.where(missing, np.nan, labels), margins


def check_trainable(name: str, labels_N: FloatArray) -> None:
    """DataError where a model would have nothing to learn from."""
    present = labels_N[~np.isnan(labels_N)]
    if len(present) == 0:
        raise DataError(
            f"preference model '{name}': no usable judgement; see 2_feedback/summary.json"
        )
    if (present > 0.5).all() or (present < 0.5).all():
        raise DataError(
            f"preference model '{name}': all {len(present)} judgements prefer the same side; the judge may be "
            f"biased by position, or the pairs are ordered (use feedback.orders: both)"
        )
