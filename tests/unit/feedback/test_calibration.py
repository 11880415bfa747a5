"""Reliability, position bias and matrix intervals by hand on tiny tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from morlaif_ray.feedback.analysis import analysis_tables, position_bias_row, summarise
from morlaif_ray.feedback.calibration import (
    calibration_rows,
    expected_calibration_error,
    folded,
    overconfidence,
    reliability,
)
from morlaif_ray.feedback.intervals import fisher_interval, normal_interval
from morlaif_ray.types import Judgement, ResponsePair

pytestmark = pytest.mark.unit
NAN = float("nan")
LN3, LN4 = math.log(3.0), math.log(4.0)  # soft labels 0.75 and 0.8


def judgement(
    pair: str, principle: str, log_odds: float, bias: float = 0.4, status: str = "ok"
) -> Judgement:
    return Judgement(pair, principle, status, log_odds, bias, "", "j")  # type: ignore[arg-type]


def pair(name: str, label: float) -> ResponsePair:
    return ResponsePair(name, name, "p", "a", "b", "preference", label)


def test_a_judgement_is_counted_from_the_side_that_the_judge_prefers() -> None:
    judgements = [
        judgement("p0", "x", LN3),  # prefers a, person too
        judgement("p1", "x", -LN3),  # prefers b, person a
        judgement("p2", "x", 0.0, status="tie"),
        judgement("p3", "x", LN3),  # nobody labelled it
        judgement("p4", "x", NAN, status="unusable"),
    ]
    confidence, agreement = folded(judgements, {"p0": 1.0, "p1": 1.0, "p2": 0.0, "p3": NAN})
    assert confidence == pytest.approx([0.75, 0.75, 0.5])
    assert agreement.tolist() == [1.0, 0.0, 0.5]


def test_the_error_is_the_gap_between_confidence_and_agreement_weighted_by_count() -> None:
    confidence = np.array([0.72, 0.74, 0.74, 0.72, 1.0, 1.0])
    agreement = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    bins = reliability(confidence, agreement)
    # Bin [0.70, 0.75): confidence 0.73, agreement 0.75; bin [0.95, 1.0]: confidence 1, agreement 0.5.
    assert [(b.low, b.high, b.count) for b in bins] == [
        (pytest.approx(0.7), pytest.approx(0.75), 4),
        (pytest.approx(0.95), 1.0, 2),
    ]
    assert [b.agreement.value for b in bins] == [0.75, 0.5]
    assert expected_calibration_error(bins) == pytest.approx((4 * 0.02 + 2 * 0.5) / 6)
    assert overconfidence(bins) == pytest.approx((-4 * 0.02 + 2 * 0.5) / 6)


def test_without_people_there_is_no_curve_and_no_error() -> None:
    bins = reliability(*folded([judgement("p0", "x", LN3)], {}))
    assert bins == []
    assert math.isnan(expected_calibration_error(bins))
    assert math.isnan(overconfidence(bins))


def test_a_judge_that_means_its_probabilities_has_no_error() -> None:
    labels = {f"p{i}": float(i % 4 != 0) for i in range(400)}
    judgements = [judgement(f"p{i}", "x", LN3) for i in range(400)]
    assert expected_calibration_error(reliability(*folded(judgements, labels))) == pytest.approx(
        0.0, abs=1e-12
    )


def test_calibration_rows_hold_the_bins_of_a_question() -> None:
    judgements = [judgement("p0", "x", LN4), judgement("p1", "x", -LN4), judgement("p0", "x", 5.0)]
    rows = calibration_rows("x", judgements, {"p0": 1.0, "p1": 1.0})
    assert [(row["principle"], row["count"], row["agreement"]) for row in rows] == [
        ("x", 2, 0.5),
        ("x", 1, 1.0),
    ]


def test_asking_in_one_order_flips_the_labels_that_the_bias_outweighs() -> None:
    entries = [
        judgement("p0", "x", 1.0, 0.4),  # answers 1.4 and 0.6: the same label either way
        judgement("p1", "x", -0.2, 0.4),  # 0.2 and -0.6: wrong if only ab is asked
        judgement("p2", "x", 0.3, 0.5),  # 0.8 and -0.2: wrong if only ba is asked
        judgement("p3", "x", -2.0, 0.3),
        judgement("p4", "x", 0.01, 0.4, status="tie"),  # no label to flip, but a bias
        judgement("p5", "x", NAN, NAN, status="failed"),
    ]
    row = position_bias_row("x", entries)
    assert row["mean"] == pytest.approx(0.4)
    assert row["num"] == 5
    # Sample standard deviation of (.4, .4, .5, .3, .4) is 0.0707, standard error 0.0316.
    assert (row["low"], row["high"]) == (
        pytest.approx(0.4 - 1.96 * 0.031623, abs=1e-4),
        pytest.approx(0.4 + 1.96 * 0.031623, abs=1e-4),
    )
    assert (row["flipped_ab"], row["flipped_ba"]) == (0.25, 0.25)
    assert (row["order_dependent"], row["num_decided"]) == (0.5, 4)


def test_one_order_leaves_only_the_fitted_bias() -> None:
    row = position_bias_row("x", [judgement("p0", "x", 1.0, NAN)], fitted_bias=0.3)
    assert row["mean"] == 0.3
    assert row["num"] == 0
    assert math.isnan(row["order_dependent"])
    assert math.isnan(row["low"])


def test_the_tables_of_the_stage_hold_matrices_with_intervals() -> None:
    signs = {"x": [1, 1, -1, 1], "y": [1, -1, -1, 1]}
    judgements = [
        judgement(f"p{i}", name, sign * (i + 1.0))
        for name, column in signs.items()
        for i, sign in enumerate(column)
    ]
    judgements += [judgement("p0", "general", 1.0), judgement("p0", "random", 1.0)]
    pairs = [pair(f"p{i}", 1.0) for i in range(4)]
    tables = analysis_tables(pairs, judgements, {}, ["x", "y"])
    assert set(tables) == {
        "agreement.csv",
        "correlation.csv",
        "matrix_intervals.csv",
        "position_bias.csv",
        "calibration.csv",
    }
    [row] = tables["matrix_intervals.csv"]
    assert (row["principle"], row["other"]) == ("x", "y")
    assert (row["agreement"], row["num_agreement"]) == (0.75, 4)
    # Wilson for 3 of 4.
    assert (row["agreement_low"], row["agreement_high"]) == (
        pytest.approx(0.3006, abs=1e-4),
        pytest.approx(0.9544, abs=1e-4),
    )
    # x = (1, 2, -3, 4), y = (1, -2, -3, 4): covariance 22/4 - 1*0, variances 30/4 - 1 and 30/4.
    assert row["correlation"] == pytest.approx(5.5 / math.sqrt(6.5 * 7.5))
    assert [entry["principle"] for entry in tables["position_bias.csv"]] == ["x", "y", "general"]
    assert {entry["principle"] for entry in tables["calibration.csv"]} == {"x", "y", "general"}


def test_the_summary_states_the_calibration_error_per_question() -> None:
    judgements = [judgement("p0", "x", LN3), judgement("p1", "x", LN3)]
    pairs = [pair("p0", 1.0), pair("p1", 0.0)]
    found = summarise(pairs, judgements, [], {}, ["x"])["by_principle"]
    assert found["x"]["calibration_error"] == pytest.approx(0.25)
    assert found["x"]["overconfidence"] == pytest.approx(0.25)
    assert math.isnan(found["general"]["calibration_error"])


def test_intervals_in_closed_form_match_the_textbook() -> None:
    # r = 0.5 of 28 pairs: z = 0.5493, standard error 1/5.
    interval = fisher_interval(0.5, 28)
    assert interval.low == pytest.approx(math.tanh(0.5493061 - 0.3919928), abs=1e-6)
    assert interval.high == pytest.approx(math.tanh(0.5493061 + 0.3919928), abs=1e-6)
    assert math.isnan(fisher_interval(NAN, 9).value)
    assert math.isnan(fisher_interval(1.0, 9).low)
    mean = normal_interval(np.array([1.0, 3.0, NAN]))
    assert (mean.value, mean.num) == (2.0, 2)
    assert mean.high - 2.0 == pytest.approx(1.959964 * math.sqrt(2.0) / math.sqrt(2.0))
    assert math.isnan(normal_interval(np.array([1.0])).low)
