"""What the judgements say about judge and principles: agreement (Figure 5a), correlation, bias, people, calibration.

    judgements -> summarise -> summary.json
               -> analysis_tables -> agreement, correlation, matrix_intervals, position_bias, calibration (.csv)

Legend: P pairs, K principles. Missing judgements are NaN and left out pair by pair, never counted as 0.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from morlaif_ray.feedback.asking import BatchOutcome
from morlaif_ray.feedback.calibration import (
    calibration_rows,
    expected_calibration_error,
    folded,
    overconfidence,
    reliability,
)
from morlaif_ray.feedback.intervals import fisher_interval, normal_interval, wilson_interval
from morlaif_ray.feedback.questions import GENERAL, RANDOM
from morlaif_ray.types import FloatArray, Interval, Judgement, ResponsePair

__all__ = [
    "agreement_matrix",
    "analysis_tables",
    "correlation_matrix",
    "human_agreement",
    "log_odds_table",
    "matrix_rows",
    "position_bias_row",
    "summarise",
    "wilson_interval",
]


def log_odds_table(
    judgements: Sequence[Judgement], names: Sequence[str]
) -> tuple[FloatArray, FloatArray]:
    """(log_odds_PK, decided_PK): log-odds with NaN where missing, and the same with NaN for ties too."""
    rows: dict[str, int] = {}
    columns = {name: column for column, name in enumerate(names)}
    # Two passes and no list: `judgements` may be a table that makes its entries while they are looked at.
    for entry in judgements:
        if entry.principle in columns:
            rows.setdefault(entry.pair_id, len(rows))
    log_odds_PK = np.full((len(rows), len(columns)), np.nan)
    decided_PK = log_odds_PK.copy()
    for entry in judgements:
        if entry.principle not in columns:
            continue
        place = rows[entry.pair_id], columns[entry.principle]
        log_odds_PK[place] = entry.log_odds
        if entry.status == "ok":
            decided_PK[place] = entry.log_odds
    return log_odds_PK, decided_PK


def agreement_matrix(decided_PK: FloatArray) -> FloatArray:
    """Share of pairs on which two principles agree; ties and missing left out, NaN if none is left."""
    present = (~np.isnan(decided_PK)).astype(np.float64)
    signs = np.where(present > 0, np.sign(np.nan_to_num(decided_PK)), 0.0)
    both = present.T @ present
    with np.errstate(invalid="ignore", divide="ignore"):
        # The sum of sign products is (agreeing - disagreeing).
        agreement: FloatArray = np.where(both > 0, 0.5 + 0.5 * (signs.T @ signs) / both, np.nan)
    return agreement


def correlation_matrix(log_odds_PK: FloatArray) -> FloatArray:
    """Pearson correlation over the pairs that both principles judged; NaN below 3 pairs or without spread."""
    size = log_odds_PK.shape[1]
    result = np.full((size, size), np.nan)
    for left in range(size):
        for right in range(left, size):
            both = ~np.isnan(log_odds_PK[:, left]) & ~np.isnan(log_odds_PK[:, right])
            x, y = log_odds_PK[both, left], log_odds_PK[both, right]
            if len(x) < 3 or x.std() == 0.0 or y.std() == 0.0:
                continue
            value = float(np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std()))
            result[left, right] = result[right, left] = value
    return result


def human_agreement(judgements: Sequence[Judgement], labels: Mapping[str, float]) -> Interval:
    """Share of decided judgements whose sign is that of the human label, over the pairs that a person decided."""
    agreeing = num = 0
    for entry in judgements:
        label = labels.get(entry.pair_id, math.nan)
        if entry.status != "ok" or math.isnan(label) or label == 0.5:
            continue
        num += 1
        agreeing += (entry.log_odds > 0.0) == (label > 0.5)
    return wilson_interval(agreeing, num)


def summarise(
    pairs: Sequence[ResponsePair],
    judgements: Sequence[Judgement],
    outcomes: Sequence[BatchOutcome],
    fitted_bias: Mapping[str, float],
    names: Sequence[str],
) -> dict[str, Any]:
    """`summary.json` of the stage (docs/artifacts.md). `names` are the K principles."""
    labels = {pair.pair_id: pair.human_label for pair in pairs}
    counts = Counter(entry.status for entry in judgements)
    models = sorted({model for outcome in outcomes for model in outcome.models if model})
    return {
        "judge": ", ".join(models),
        "num_questions": sum(len(outcome.log_odds_N) for outcome in outcomes),
        "num_judgements": len(judgements),
        "num_usable": counts["ok"] + counts["tie"],
        "num_ties": counts["tie"],
        "num_unusable": counts["unusable"],
        "num_failed": counts["failed"],
        "tokens": sum(outcome.prompt_tokens + outcome.completion_tokens for outcome in outcomes),
        "cost_usd": math.fsum(outcome.cost_usd for outcome in outcomes),
        "by_principle": {
            name: _of_principle(entries, labels, fitted_bias.get(name))
            for name, entries in _by_question(judgements, names)
        },
    }


def _by_question(
    judgements: Sequence[Judgement], names: Sequence[str]
) -> Iterator[tuple[str, list[Judgement]]]:
    """(question, its judgements), one question in memory at a time: the K principles, then "general" and "random"."""
    rows: dict[str, array[int]] = {name: array("q") for name in (*names, GENERAL, RANDOM)}
    for row, entry in enumerate(judgements):
        rows[entry.principle].append(row)
    for name, own in rows.items():
        yield name, [judgements[row] for row in own]


def _of_principle(
    entries: Sequence[Judgement], labels: Mapping[str, float], fitted_bias: float | None
) -> dict[str, float | int]:
    human = human_agreement(entries, labels)
    bins = reliability(*folded(entries, labels))
    biases = [entry.position_bias for entry in entries if not math.isnan(entry.position_bias)]
    measured = math.fsum(biases) / len(biases) if biases else math.nan
    return {
        "usable": sum(entry.status in ("ok", "tie") for entry in entries),
        "ties": sum(entry.status == "tie" for entry in entries),
        "unusable": sum(entry.status == "unusable" for entry in entries),
        "failed": sum(entry.status == "failed" for entry in entries),
        "mean_position_bias": measured if fitted_bias is None else fitted_bias,
        "human_agreement": human.value,
        "human_agreement_low": human.low,
        "human_agreement_high": human.high,
        "num_human": human.num,
        "calibration_error": expected_calibration_error(bins),
        "overconfidence": overconfidence(bins),
    }


def analysis_tables(
    pairs: Sequence[ResponsePair],
    judgements: Sequence[Judgement],
    fitted_bias: Mapping[str, float],
    names: Sequence[str],
) -> dict[str, list[dict[str, Any]]]:
    """File name -> rows of the stage's CSV tables (docs/artifacts.md). `names` are the K principles."""
    labels = {pair.pair_id: pair.human_label for pair in pairs}
    biases, calibration = [], []
    for name, entries in _by_question(judgements, names):
        # "random" repeats other judgements: it has neither a bias nor a calibration of its own.
        if name != RANDOM:
            biases.append(position_bias_row(name, entries, fitted_bias.get(name)))
            calibration += calibration_rows(name, entries, labels)
    log_odds_PK, decided_PK = log_odds_table(judgements, names)
    agreement, correlation = agreement_matrix(decided_PK), correlation_matrix(log_odds_PK)
    return {
        "agreement.csv": matrix_rows(agreement, names),
        "correlation.csv": matrix_rows(correlation, names),
        "matrix_intervals.csv": _interval_rows(
            agreement, _shared(decided_PK), correlation, _shared(log_odds_PK), names
        ),
        "position_bias.csv": biases,
        "calibration.csv": calibration,
    }


def position_bias_row(
    name: str, entries: Sequence[Judgement], fitted_bias: float | None = None
) -> dict[str, Any]:
    """A row of `position_bias.csv`: the mean bias (nats), and what asking in one order only would have done.

    From log-odds l and bias b the answers were l + b (a first) and l - b (b first, turned around); over the decided
    pairs, `flipped_ab` and `flipped_ba` are the shares whose label would change sign if only that order were asked, and
    `order_dependent` (with interval) is the share where either would: the judge names the same slot both times.
    Where one order was asked, `fitted_bias` is all that is known.
    """
    bias_N = np.array([entry.position_bias for entry in entries], dtype=np.float64)
    log_odds_N = np.array([entry.log_odds for entry in entries], dtype=np.float64)
    decided = np.array([entry.status == "ok" for entry in entries], dtype=np.bool_)
    mean = normal_interval(bias_N)
    seen = decided & ~np.isnan(bias_N)
    sign_N = np.sign(log_odds_N[seen])
    flipped_ab = np.sign(log_odds_N[seen] + bias_N[seen]) != sign_N
    flipped_ba = np.sign(log_odds_N[seen] - bias_N[seen]) != sign_N
    num = int(seen.sum())
    either = wilson_interval(float((flipped_ab | flipped_ba).sum()), num)
    return {
        "principle": name,
        "mean": mean.value if fitted_bias is None else fitted_bias,
        "low": mean.low,
        "high": mean.high,
        "num": mean.num,
        "flipped_ab": float(flipped_ab.mean()) if num else math.nan,
        "flipped_ba": float(flipped_ba.mean()) if num else math.nan,
        "order_dependent": either.value,
        "order_dependent_low": either.low,
        "order_dependent_high": either.high,
        "num_decided": num,
    }


def _shared(table_PK: FloatArray) -> FloatArray:
    """Number of pairs that two principles both have a value for [K, K]."""
    present = (~np.isnan(table_PK)).astype(np.float64)
    shared: FloatArray = present.T @ present
    return shared


def _interval_rows(
    agreement: FloatArray,
    num_agreement: FloatArray,
    correlation: FloatArray,
    num_correlation: FloatArray,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """One row per unordered pair of principles: both figures with 95% intervals (Wilson; Fisher's z)."""
    rows = []
    for left, name in enumerate(names):
        for right in range(left + 1, len(names)):
            num = int(num_agreement[left, right])
            agree = wilson_interval(float(np.nan_to_num(agreement[left, right])) * num, num)
            relate = fisher_interval(
                float(correlation[left, right]), int(num_correlation[left, right])
            )
            rows.append(
                {
                    "principle": name,
                    "other": names[right],
                    "agreement": agree.value,
                    "agreement_low": agree.low,
                    "agreement_high": agree.high,
                    "num_agreement": agree.num,
                    "correlation": relate.value,
                    "correlation_low": relate.low,
                    "correlation_high": relate.high,
                    "num_correlation": relate.num,
                }
            )
    return rows


def matrix_rows(matrix_KK: FloatArray, names: Sequence[str]) -> list[dict[str, Any]]:
    """A K x K matrix as CSV rows `principle, <K columns>`; NaN as an empty cell."""
    return [
        {"principle": name}
        | {
            other: "" if math.isnan(value) else float(value)
            for other, value in zip(names, row, strict=True)
        }
        for name, row in zip(names, matrix_KK, strict=True)
    ]
