"""Calibration rows of stage 3 from the score tables, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.preference_tables import calibration_rows
from morlaif_ray.artifacts import write_table
from morlaif_ray.evaluation.statistics import measures_length
from morlaif_ray.preference.labels import LogOddsTable
from morlaif_ray.types import ResponsePair

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def test_the_temperature_comes_from_weights_and_the_error_from_test(tmp_path: Path) -> None:
    odds = math.log(3.0)
    pairs, values = [], []
    for split, num in (("weights", 8), ("test", 6)):
        for row in range(num):
            name = f"{split}{row}"
            pairs.append(ResponsePair(name, f"p{row}", "p", "a", "b", split, float(row % 2)))
            values.append([odds, math.inf if row % 2 else -math.inf])
        mine = [pair for pair in pairs if pair.split == split]
        human = np.array([pair.human_label for pair in mine])
        columns: dict[str, Any] = {
            "pair_id": [pair.pair_id for pair in mine],
            "a_detail": [2.0 * odds] * num,  # twice as sure as the judge
            "b_detail": [0.0] * num,
            "a_baseline_human_labels": 2.0 * human - 1.0,  # never wrong
            "b_baseline_human_labels": [0.0] * num,
        }
        write_table(tmp_path / f"scores_{split}.parquet", columns)
    table = LogOddsTable(
        tuple(pair.pair_id for pair in pairs),
        ("detail", "baseline_human_labels"),
        np.array(values),
    )
    card = {
        "principles": ["detail"],
        "baselines": {"human_labels": {}, "best_principle": {"principle": "detail"}},
    }
    for split in ("weights", "test"):
        _copy_column(tmp_path / f"scores_{split}.parquet")
    detail, human_row, best = calibration_rows(tmp_path, card, pairs, table, seed=0)
    assert (detail["model"], detail["kind"]) == ("detail", "principle")
    assert detail["temperature"] == pytest.approx(2.0)
    assert (detail["num_fitted"], detail["num"]) == (8, 6)
    assert detail["error_before"] == pytest.approx(0.9 - 0.75)  # sigmoid(2 ln 3) = 0.9
    assert detail["error_after"] == pytest.approx(0.0, abs=1e-9)
    assert detail["error_before_low"] <= detail["error_before"] + 1e-9
    assert detail["error_before"] <= detail["error_before_high"] + 1e-9
    assert detail["log_loss_after"] < detail["log_loss_before"]
    # People's own labels are never contradicted: no finite temperature is best, and none is made up.
    assert human_row["model"] == "baseline_human_labels"
    assert math.isnan(human_row["temperature"])
    assert math.isnan(human_row["error_after"])
    assert (best["model"], best["temperature"]) == (
        "baseline_best_principle",
        detail["temperature"],
    )


def _copy_column(path: Path) -> None:
    """`best_principle` points at a principle's own scores."""
    from morlaif_ray.artifacts import read_table

    table = read_table(path)
    for side in "ab":
        table[f"{side}_baseline_best_principle"] = table[f"{side}_detail"]
    write_table(path, table)


@pytest.mark.parametrize(
    ("correlation", "mostly"), [(0.72, True), (-0.72, True), (0.7, False), (math.nan, False)]
)
def test_a_model_measures_length_where_that_explains_over_half_its_variance(
    correlation: float, mostly: bool
) -> None:
    assert measures_length(correlation) is mostly
