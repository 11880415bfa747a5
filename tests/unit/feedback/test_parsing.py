"""First-token log-probabilities -> log-odds; what cannot be read is named, never guessed."""

from __future__ import annotations

import math

import pytest

from morlaif_ray.feedback.client import RawAnswer
from morlaif_ray.feedback.parsing import (
    HARD_LOG_ODDS,
    final_answer_token,
    hard_logprobs,
    letter_of,
    parse_answer,
    read_choices,
)

pytestmark = pytest.mark.unit


def raw(top: dict[str, float], refusal: str = "") -> RawAnswer:
    return RawAnswer(top, "m", 10, 1, refusal)


def test_log_odds_is_the_difference_of_the_two_letters() -> None:
    parsed = parse_answer(raw({"A": math.log(0.6), "B": math.log(0.3), "The": math.log(0.1)}))
    assert parsed.log_odds == pytest.approx(math.log(2.0))
    assert parsed.mass == pytest.approx(0.9)
    assert parsed.reason == ""


def test_spellings_of_a_letter_are_summed_as_probabilities() -> None:
    top = {"A": 0.30, " A": 0.10, "(A": 0.05, "a": 0.05, "B": 0.20, " b": 0.05, "Both": 0.25}
    parsed = parse_answer(raw({token: math.log(p) for token, p in top.items()}))
    assert parsed.log_odds == pytest.approx(math.log(0.50 / 0.25))
    assert parsed.mass == pytest.approx(0.75)


@pytest.mark.parametrize(
    "token", ["A", " A", "(A", "a", "A.", "A)", '"A"', "**A", "\u0120A", "\u2581A", "\nA"]
)
def test_a_spelling_counts_as_the_letter(token: str) -> None:
    assert letter_of(token) == "A"


@pytest.mark.parametrize("token", ["And", "AB", "Both", "", " ", "C", "1", "An"])
def test_other_tokens_are_no_letter(token: str) -> None:
    assert letter_of(token) == ""


@pytest.mark.parametrize(
    ("top", "reason", "mass"),
    [
        ({"A": math.log(0.8), "The": math.log(0.2)}, "B is not among the top tokens", 0.8),
        ({"B": math.log(0.7)}, "A is not among the top tokens", 0.7),
        ({"I": -0.1, "The": -3.0}, "neither A nor B among the top tokens", 0.0),
        ({}, "no log-probabilities in the answer", 0.0),
        ({"A": math.log(0.8), "B": -9999.0}, "B is not among the top tokens", 0.8),
        ({"A": math.nan, "B": math.log(0.5)}, "A is not among the top tokens", 0.5),
    ],
)
def test_a_missing_letter_has_a_reason_and_no_number(
    top: dict[str, float], reason: str, mass: float
) -> None:
    parsed = parse_answer(raw(top))
    assert math.isnan(parsed.log_odds)
    assert parsed.reason == reason
    assert parsed.mass == pytest.approx(mass)


def test_a_refusal_is_unreadable_even_with_letters() -> None:
    parsed = parse_answer(raw({"A": -0.1, "B": -2.0}, refusal="I will not."))
    assert (parsed.reason, parsed.mass) == ("the judge refused", 0.0)


@pytest.mark.parametrize(
    ("tokens", "place"),
    [
        (["Answer", ":", " B"], 2),
        (["Answer: A", ". But no.\n", "Answer:", " B", "."], 3),
        (["**", "Answer", ":**", " A"], 3),
        (["The answer is ", "(B", ")"], 1),
        (["answer", ": ", "b"], 2),
        (["It fails to answer a question"], None),
        (["Answer: a good one is hard to find"], None),
        (["I prefer B"], None),
        ([], None),
    ],
)
def test_the_last_answer_marker_is_found_and_articles_are_not_letters(
    tokens: list[str], place: int | None
) -> None:
    assert final_answer_token(tokens) == place


def test_a_bare_letter_counts_two_nats() -> None:
    for letter, expected in (("A", HARD_LOG_ODDS), ("B", -HARD_LOG_ODDS)):
        parsed = parse_answer(RawAnswer(hard_logprobs(letter), "m", 1, 1))
        assert parsed.log_odds == pytest.approx(expected)
        assert parsed.mass == pytest.approx(1.0)


def test_letters_are_read_from_a_json_object_and_missing_ones_are_absent() -> None:
    content = '{"x": "A", "y": "b", "z": "C", "v": true, "u": 1}'  # 1: response 1, or surely B?
    found, problem = read_choices(content, ["x", "y", "z", "v", "u", "w"])
    assert (found, problem) == ({"x": hard_logprobs("A"), "y": hard_logprobs("B")}, "")
    assert read_choices('{"x": "A"', ["x"])[1] == "the answer is not the JSON object asked for"
    assert read_choices('["A"]', ["x"])[1] == "the answer is not the JSON object asked for"


def test_a_strength_beyond_its_bounds_is_none() -> None:
    assert read_choices('{"x": 101, "y": -1, "z": true}', ["x", "y", "z"], True) == ({}, "")


def test_a_stated_strength_is_a_soft_preference_and_never_a_certainty() -> None:
    found, _ = read_choices('{"x": 75, "y": 50, "z": 0, "v": 100}', ["x", "y", "z", "v"], True)
    log_odds = {
        name: parse_answer(RawAnswer(top, "m", 1, 1)).log_odds for name, top in found.items()
    }
    assert log_odds["x"] == pytest.approx(math.log(3.0))
    assert log_odds["y"] == pytest.approx(0.0)
    assert log_odds["v"] == pytest.approx(math.log(0.98 / 0.02))
    assert log_odds["z"] == pytest.approx(-log_odds["v"])
    assert parse_answer(RawAnswer(found["x"], "m", 1, 1)).mass == pytest.approx(1.0)
