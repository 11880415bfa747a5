"""Debiasing by hand: both orders, one random slot, ties, unusable answers."""

from __future__ import annotations

import math

import pytest

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.combining import (
    Answer,
    CombineRule,
    combine_orders,
    combine_single,
    fit_position_bias,
)

pytestmark = pytest.mark.unit
RULE = CombineRule(tie_threshold=0.05, min_answer_mass=0.5)


def answer(log_odds: float, mass: float = 0.9) -> Answer:
    return Answer(log_odds, mass, "", "judge-1")


def test_both_orders_split_into_opinion_and_position_bias() -> None:
    # l = (1.4 - 0.2) / 2 = 0.6 for response_a; b = (1.4 + 0.2) / 2 = 0.8 for whatever is shown first
    judgement = combine_orders("p", "detail", answer(1.4), answer(0.2), RULE)
    assert judgement.log_odds == pytest.approx(0.6)
    assert judgement.position_bias == pytest.approx(0.8)
    assert (judgement.status, judgement.judge, judgement.reason) == ("ok", "judge-1", "")
    assert judgement.label == pytest.approx(1 / (1 + math.exp(-0.6)))


def test_swapping_the_responses_negates_the_log_odds_and_keeps_the_bias() -> None:
    swapped = combine_orders("p", "detail", answer(0.2), answer(1.4), RULE)
    assert swapped.log_odds == pytest.approx(-0.6)
    assert swapped.position_bias == pytest.approx(0.8)


def test_a_judge_that_always_takes_the_first_says_nothing() -> None:
    judgement = combine_orders("p", "detail", answer(3.0), answer(3.0), RULE)
    assert (judgement.status, judgement.log_odds, judgement.position_bias) == ("tie", 0.0, 3.0)


@pytest.mark.parametrize(("log_odds", "status"), [(0.049, "tie"), (0.051, "ok"), (-0.049, "tie")])
def test_a_tie_lies_below_the_threshold(log_odds: float, status: str) -> None:
    judgement = combine_orders("p", "detail", answer(log_odds), answer(-log_odds), RULE)
    assert judgement.status == status
    assert judgement.log_odds == pytest.approx(log_odds)  # a tie keeps its number


def test_low_mass_is_unusable_and_names_order_and_limit() -> None:
    judgement = combine_orders("p", "detail", answer(1.0), answer(-1.0, mass=0.4), RULE)
    assert judgement.status == "unusable"
    assert math.isnan(judgement.log_odds)
    assert math.isnan(judgement.label)
    assert judgement.reason == "ba: A/B mass below 0.5"


def test_a_missing_token_in_one_order_makes_the_judgement_unusable() -> None:
    missing = Answer(math.nan, 0.8, "B is not among the top tokens", "judge-1")
    judgement = combine_orders("p", "detail", missing, answer(1.0), RULE)
    assert (judgement.status, judgement.reason) == ("unusable", "ab: B is not among the top tokens")
    assert math.isnan(judgement.log_odds)


def test_a_question_without_any_answer_is_failed_not_unusable() -> None:
    failed = Answer(math.nan, 0.0, "timeout: no answer", "", failed=True)
    assert combine_orders("p", "detail", answer(1.0), failed, RULE).status == "failed"


def test_one_random_slot_is_corrected_by_the_fitted_bias() -> None:
    # True opinions +1 and bias 0.5: shown as ab gives 1.5, as ba gives -1 + 0.5 = -0.5.
    answers = [("ab", answer(1.5))] * 5 + [("ba", answer(-0.5))] * 5
    bias = fit_position_bias("detail", answers, RULE)  # type: ignore[arg-type]
    assert bias == pytest.approx(0.5)
    assert combine_single("p", "detail", "ab", answer(1.5), bias, RULE).log_odds == pytest.approx(
        1.0
    )
    flipped = combine_single("p", "detail", "ba", answer(-0.5), bias, RULE)
    assert flipped.log_odds == pytest.approx(1.0)
    assert math.isnan(flipped.position_bias)


def test_too_few_answers_to_fit_a_bias_say_what_to_write() -> None:
    answers = [("ab", answer(1.0))] * 9 + [("ba", answer(1.0, mass=0.1))] * 9
    with pytest.raises(
        FeedbackError, match=r"'detail' has only 0 usable answers .* write orders: both"
    ):
        fit_position_bias("detail", answers, RULE)  # type: ignore[arg-type]
