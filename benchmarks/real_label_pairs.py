"""People's labels for `benchmarks/real_labels.py`: pairs of responses, who is better on which head, and accuracies.

H heads, N pairs. Nothing here loads a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from morlaif_ray.data.files import read_rows
from morlaif_ray.data.rewardbench import parse_rewardbench
from morlaif_ray.data.rows import RowProblem
from morlaif_ray.seeding import unit_interval
from morlaif_ray.types import FloatArray

HUMAN = "human"
ERROR_HEADS = {
    "Irrelevant": "relevance",
    "Redundant": "conciseness",
    "Wrong-Grounding": "grounding",
}
MISSING_HEAD = "completeness"
TEST_SHARE = 0.3
VALIDATION_SHARE = 0.2
"""Of the training prompts."""


@dataclass(frozen=True)
class LabelledPair:
    prompt: str
    first: str
    second: str
    labels: dict[str, float]
    """Head -> 1.0 where the first response is better, 0.0 where the second."""


def read_hh(path: Path) -> list[LabelledPair]:
    """Rows with an empty or an equal response are left out."""
    found = []
    for row in read_rows(path):
        try:
            pair, _ = parse_rewardbench(row.value)
        except RowProblem:
            continue
        if pair.first != pair.second:
            found.append(_shuffled(pair.prompt, pair.first, pair.second, [HUMAN]))
    return found


def read_finegrained(path: Path) -> list[LabelledPair]:
    """People's preferences among four predictions, and the first one against its correction."""
    found = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        prompt = f"\n\nHuman: {row['question']}\n\nAssistant:"
        texts = [row[f"prediction {number}"] for number in (1, 2, 3, 4)]
        order = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        for (i, j), choice in zip(order, row["preference"], strict=True):
            if choice and texts[i] != texts[j]:
                good, bad = (i, j) if choice == 1 else (j, i)
                found.append(_shuffled(prompt, texts[good], texts[bad], [HUMAN]))
        feedback = row["feedback"]
        heads = {
            ERROR_HEADS[error["error type"]]
            for error in feedback["errors"]
            if error["error type"] in ERROR_HEADS
        }
        heads |= {MISSING_HEAD} if feedback["missing-info"] else set()
        corrected = feedback["corrected-prediction"]
        if heads and corrected.strip() and corrected != texts[0]:
            found.append(_shuffled(prompt, corrected, texts[0], sorted(heads)))
    return found


def _shuffled(prompt: str, good: str, bad: str, heads: Sequence[str]) -> LabelledPair:
    """The better response first or second by a coin that depends on the texts alone."""
    if unit_interval("slot", prompt, good, bad) < 0.5:
        return LabelledPair(prompt, good, bad, dict.fromkeys(heads, 1.0))
    return LabelledPair(prompt, bad, good, dict.fromkeys(heads, 0.0))


def is_test(pair: LabelledPair) -> bool:
    return unit_interval("real labels", pair.prompt) < TEST_SHARE


def is_validation(pair: LabelledPair) -> bool:
    """Of a training pair."""
    return unit_interval("real labels validation", pair.prompt) < VALIDATION_SHARE


def label_matrix(pairs: Sequence[LabelledPair], heads: Sequence[str]) -> FloatArray:
    """1, 0, or NaN where no one chose: [N, H]."""
    values = [[pair.labels.get(head, np.nan) for head in heads] for pair in pairs]
    return np.array(values, dtype=np.float64).reshape(len(pairs), len(heads))


def credit(gap: FloatArray, labels: FloatArray) -> FloatArray:
    """1 where the gap has the label's sign, 0.5 where it is 0, NaN where no one chose."""
    right = 0.5 * (1.0 + np.sign(gap) * np.sign(2.0 * labels - 1.0))
    return np.where(np.isnan(labels), np.nan, right)


def mean_accuracy(
    gaps: Mapping[str, FloatArray], labels_NH: FloatArray, heads: Sequence[str]
) -> float:
    """Mean over the heads that have a label of the share of right pairs; NaN without any."""
    shares = [
        np.nanmean(credit(gaps[head], labels))
        for head, labels in zip(heads, labels_NH.T, strict=True)
        if not np.isnan(labels).all()
    ]
    return float(np.mean(shares)) if shares else float("nan")


def length_gaps(pairs: Sequence[LabelledPair]) -> FloatArray:
    """Words of the first response minus words of the second."""
    return np.array([float(len(p.first.split()) - len(p.second.split())) for p in pairs])
