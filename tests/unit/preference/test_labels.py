"""From judgements to labels, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from morlaif_ray.errors import DataError
from morlaif_ray.preference.labels import LogOddsTable, check_trainable, log_odds_table, targets
from morlaif_ray.types import Judgement, ResponsePair

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

NAN, INF = float("nan"), float("inf")
ALL = ("random_principle", "general_principle", "best_principle", "mean_log_odds", "human_labels")


def pair(name: str, human: float) -> ResponsePair:
    return ResponsePair(name, "p", "prompt", " a", " b", "preference", human)


def judged(pair_id: str, principle: str, log_odds: float) -> Judgement:
    status = "unusable" if math.isnan(log_odds) else "ok"
    return Judgement(pair_id, principle, status, log_odds, NAN, "", "rules")


PAIRS = [pair("x", 1.0), pair("y", 0.0), pair("z", NAN)]
JUDGEMENTS = [
    judged("x", "detail", 2.0),
    judged("x", "bias", -1.0),
    judged("x", "random", 2.0),
    judged("x", "general", 0.5),
    judged("y", "detail", NAN),
    judged("y", "bias", -3.0),
    judged("y", "general", -0.25),
    judged("elsewhere", "detail", 9.0),
    judged("x", "empathy", 9.0),
]


@pytest.fixture
def table() -> LogOddsTable:
    return log_odds_table(PAIRS, JUDGEMENTS, ["detail", "bias"], ALL)


def test_columns_are_the_principles_then_the_trained_baselines(table: LogOddsTable) -> None:
    assert table.pair_ids == ("x", "y", "z")
    assert table.columns == (
        "detail",
        "bias",
        "baseline_random_principle",
        "baseline_general_principle",
        "baseline_mean_log_odds",  # best_principle points at a principle's own model
        "baseline_human_labels",
    )


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("detail", [2.0, NAN, NAN]),
        ("bias", [-1.0, -3.0, NAN]),
        ("baseline_random_principle", [2.0, NAN, NAN]),
        ("baseline_general_principle", [0.5, -0.25, NAN]),
        ("baseline_mean_log_odds", [0.5, -3.0, NAN]),  # over the present ones
        ("baseline_human_labels", [INF, -INF, NAN]),
    ],
)
def test_a_missing_judgement_is_nan_never_zero(
    table: LogOddsTable, column: str, values: list[float]
) -> None:
    np.testing.assert_array_equal(table.column(column), values)


def test_soft_labels_are_the_judges_probabilities() -> None:
    labels, margins = targets(np.array([[0.0, math.log(3.0)], [NAN, -1000.0]]), "soft_label")
    np.testing.assert_allclose(labels, [[0.5, 0.75], [NAN, 0.0]])
    np.testing.assert_array_equal(margins, np.zeros((2, 2)))


def test_margins_are_the_judges_log_odds_beside_hard_labels() -> None:
    labels, margins = targets(np.array([[2.5, -0.5, 0.0, NAN]]), "margin")
    np.testing.assert_array_equal(labels, [[1.0, 0.0, 0.5, NAN]])
    np.testing.assert_array_equal(margins, [[2.5, 0.5, 0.0, 0.0]])


@pytest.mark.parametrize("loss", ["soft_label", "margin"])
def test_a_persons_choice_is_a_hard_label_without_margin(loss: str) -> None:
    labels, margins = targets(np.array([[INF, -INF]]), loss)
    np.testing.assert_array_equal(labels, [[1.0, 0.0]])
    np.testing.assert_array_equal(margins, [[0.0, 0.0]])


def test_a_column_without_judgements_cannot_be_trained() -> None:
    with pytest.raises(DataError, match="'detail': no usable judgement; see 2_feedback/summary"):
        check_trainable("detail", np.array([NAN, NAN]))


@pytest.mark.parametrize("labels", [[0.9, 0.6, NAN], [0.0, 0.0, 0.3]])
def test_a_column_of_one_class_cannot_be_trained(labels: list[float]) -> None:
    with pytest.raises(DataError, match="judgements prefer the same side; the judge may be"):
        check_trainable("detail", np.array(labels))


def test_a_column_with_both_classes_can_be_trained() -> None:
    check_trainable("detail", np.array([0.9, NAN, 0.2]))
