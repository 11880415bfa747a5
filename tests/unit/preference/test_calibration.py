"""Temperature and calibration error, by hand and against a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from morlaif_ray.preference.calibration import fit_temperature, measure_calibration

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]
NAN = math.nan


def test_the_temperature_of_two_kinds_of_pairs_by_hand() -> None:
    # Difference 2, and people agree on 3 of 4: sigmoid(2/T) = 3/4, so T = 2/ln 3.
    differences = np.array([2.0, 2.0, 2.0, 2.0])
    assert fit_temperature(differences, np.array([1.0, 1.0, 1.0, 0.0])) == pytest.approx(
        2.0 / math.log(3.0)
    )
    soft = fit_temperature(differences, np.array([0.75, 0.75, 0.75, 0.75]))
    assert soft == pytest.approx(2.0 / math.log(3.0))


def test_a_model_that_is_three_times_too_sure_gets_temperature_three() -> None:
    rng = np.random.default_rng(0)
    true_odds = rng.normal(0.0, 1.5, 40_000)
    labels = (rng.random(40_000) < 1.0 / (1.0 + np.exp(-true_odds))).astype(float)
    labels[::10] = NAN
    temperature = fit_temperature(3.0 * true_odds, labels)
    assert temperature == pytest.approx(3.0, rel=0.05)
    before = measure_calibration(3.0 * true_odds, labels)
    after = measure_calibration(3.0 * true_odds, labels, temperature)
    assert before.num == after.num == 36_000
    assert before.error > 0.1
    assert after.error < 0.01
    assert after.log_loss < before.log_loss


@pytest.mark.parametrize(
    ("differences", "labels"),
    [
        ([1.0, 2.0], [1.0, 1.0]),  # never wrong: the best T is 0
        ([1.0, 2.0], [0.0, 0.0]),  # always wrong: negative
        ([1.0, 1.0], [0.5, 0.5]),  # says nothing: infinite
        ([0.0, 0.0], [1.0, 0.0]),  # the same score for both
        ([1.0, NAN], [NAN, 1.0]),
    ],
    ids=["separable", "reversed", "uninformative", "constant", "unlabelled"],
)
def test_no_temperature_is_nan_and_not_a_made_up_number(
    differences: list[float], labels: list[float]
) -> None:
    assert math.isnan(fit_temperature(np.array(differences), np.array(labels)))


def test_the_calibration_error_by_hand() -> None:
    odds = math.log(0.9 / 0.1)  # confidence 0.9: bin 0.9 to 0.95; 0.7: bin 0.7 to 0.75
    other = math.log(0.7 / 0.3)
    differences = np.array([odds, -odds, odds, other, -other])
    labels = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    # Bin 1: |3 * 0.9 - 2| = 0.7; bin 2: |2 * 0.7 - 2| = 0.6; over 5 pairs.
    found = measure_calibration(differences, labels)
    assert found.error == pytest.approx((0.7 + 0.6) / 5)
    expected = -(2 * math.log(0.9) + math.log(0.1) + 2 * math.log(0.7)) / 5
    assert found.log_loss == pytest.approx(expected)


def test_swapping_the_two_responses_changes_no_figure() -> None:
    rng = np.random.default_rng(3)
    differences, labels = rng.normal(0, 2, 300), rng.random(300)
    flip = rng.random(300) < 0.5
    swapped = np.where(flip, -differences, differences), np.where(flip, 1.0 - labels, labels)
    assert fit_temperature(*swapped) == pytest.approx(fit_temperature(differences, labels))
    assert measure_calibration(*swapped).error == pytest.approx(
        measure_calibration(differences, labels).error
    )


def test_without_labels_or_temperature_there_is_no_error_to_state() -> None:
    empty = measure_calibration(np.array([1.0]), np.array([NAN]))
    assert math.isnan(empty.error)
    assert empty.num == 0
    assert math.isnan(measure_calibration(np.array([1.0]), np.array([1.0]), NAN).error)
