"""The embedded judge answers like a chat completion, and its lexical measures point the right way."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from morlaif_ray.config.judging import RulesJudge
from morlaif_ray.feedback.client import AttemptError, Question
from morlaif_ray.feedback.judges import build_client
from morlaif_ray.feedback.measures import MEASURES, measure
from morlaif_ray.feedback.parsing import parse_answer
from morlaif_ray.feedback.rules_client import pair_noise, top_logprobs
from morlaif_ray.testbed import PRINCIPLES, make_prompts, oracle_log_odds

pytestmark = pytest.mark.unit
PROMPT = "\n\nHuman: How do I grow tomatoes? I feel sad because my garden died.\n\nAssistant:"


def ask(
    judge: RulesJudge, first: str, second: str, principle: str, key: bytes = b"\x80" * 16
) -> float:
    question = Question(PROMPT, first, second, principle, "?", "ab", key)
    return parse_answer(asyncio.run(build_client(judge, seed=0).ask(question))).log_odds


@pytest.mark.parametrize("log_odds", [0.0, 1.3, -7.0, 30.0])
def test_the_five_tokens_carry_exactly_the_log_odds(log_odds: float) -> None:
    top = top_logprobs(log_odds)
    assert len(top) == 5
    assert sum(math.exp(value) for value in top.values()) == pytest.approx(1.0)
    question_answer = parse_answer_of(top)
    assert question_answer == pytest.approx(log_odds)


def parse_answer_of(top: dict[str, float]) -> float:
    from morlaif_ray.feedback.client import RawAnswer

    return parse_answer(RawAnswer(top, "m", 1, 1)).log_odds


def test_the_position_bias_is_added_for_whatever_comes_first() -> None:
    judge = RulesJudge(noise=0.0, position_bias=0.4, fault_share=0.0)
    ab = ask(
        judge, " Plant seeds.", " Plant them, for example in May, in 30 litres of soil.", "detail"
    )
    ba = ask(
        judge, " Plant them, for example in May, in 30 litres of soil.", " Plant seeds.", "detail"
    )
    assert (ab + ba) / 2 == pytest.approx(0.4)
    assert (ab - ba) / 2 < -0.2


def test_noise_belongs_to_the_pair_and_flips_with_the_order() -> None:
    assert pair_noise(0, "detail", "p", "x", "y") == -pair_noise(0, "detail", "p", "y", "x")
    draws = [pair_noise(seed, "detail", "p", "x", "y") for seed in range(2000)]
    assert sum(draws) / 2000 == pytest.approx(0.0, abs=0.08)
    assert sum(draw * draw for draw in draws) / 2000 == pytest.approx(1.0, abs=0.12)


def test_faults_come_at_their_share_and_a_transient_error_passes() -> None:
    judge = RulesJudge(fault_share=0.1, noise=0.0)
    client = build_client(judge, seed=0)
    missing = Question(PROMPT, " a", " b", "detail", "?", "ab", b"\x00" * 16)
    assert (
        parse_answer(asyncio.run(client.ask(missing))).reason
        == "neither A nor B among the top tokens"
    )
    flaky = Question(
        PROMPT, " a", " b", "detail", "?", "ab", bytes([38]) + b"\x00" * 15
    )  # 38/256 = 0.148
    with pytest.raises(AttemptError):
        asyncio.run(client.ask(flaky))
    assert not math.isnan(parse_answer(asyncio.run(client.ask(flaky))).log_odds)


def test_unusual_spellings_change_nothing() -> None:
    judge = RulesJudge(fault_share=0.0, noise=0.0)
    usual = ask(judge, " Plant seeds.", " No.", "detail", key=b"\x10" * 16)
    for tail in range(3):
        key = b"\xff" * 7 + bytes([tail]) + b"\x00" * 8
        assert ask(judge, " Plant seeds.", " No.", "detail", key=key) == pytest.approx(usual)


def test_the_oracle_judge_says_what_the_oracle_says() -> None:
    prompt = make_prompts(1, 5)[0]
    judge = RulesJudge(measures="testbed", noise=0.3, position_bias=0.4, fault_share=0.0)
    client = build_client(judge, seed=7)
    for name in (*PRINCIPLES, "general"):
        question = Question(prompt, " yes .", " no .", name, "?", "ab", b"\x80" * 16)
        found = parse_answer(asyncio.run(client.ask(question))).log_odds
        expected = 0.4 + oracle_log_odds(prompt, " yes .", " no .", name, noise=0.3, seed=7)
        assert found == pytest.approx(expected)


BETTER_AND_WORSE = {
    "helpfulness": (
        " To grow tomatoes, plant seeds in warm soil and water them daily.",
        " I don't know.",
    ),
    "ethicality": (
        " Plant seeds in spring.",
        " Steal plants from the shop, it is illegal but easy.",
    ),
    "factuality": (
        " Usually they need 6 hours of sun, because they like warmth.",
        " Everyone always wins.",
    ),
    "toxicity": (" Plant seeds in spring.", " You stupid idiot, that garden is trash."),
    "sycophancy": (
        " Actually, however, that is not the reason.",
        " You're right, great question, I agree!",
    ),
    "empathy": (" I'm sorry to hear that, it sounds like you feel sad.", " Buy soil."),
    "relevance": (" Tomatoes grow in a garden with sun.", " My car has four wheels."),
    "context": (" Your garden died? Grow tomatoes in pots?", " My car has wheels."),
    "bias": (
        " Respect people regardless of origin.",
        " Those people are lazy, women tend to be inferior.",
    ),
    "understandability": (
        " Put a seed in soil. Add water.",
        " Horticultural implementation necessitates comprehensive preparatory investigations beforehand.",
    ),
    "detail": (
        " First, buy seeds such as roma, then plant 3 of them, for example in May.",
        " Plant.",
    ),
    "conciseness": (
        " Plant seeds.",
        " Well, basically you really just want to actually plant some seeds. " * 5,
    ),
}


@pytest.mark.parametrize("principle", sorted(MEASURES))
def test_a_measure_prefers_the_better_response(principle: str) -> None:
    better, worse = BETTER_AND_WORSE[principle]
    assert measure(PROMPT, better)[principle] > measure(PROMPT, worse)[principle] + 0.05


@pytest.mark.parametrize("response", ["", " ", "!!!", " \u4f60\u597d", " word" * 3000, "\ud800"])
def test_measures_stay_in_the_unit_interval_for_any_text(response: str) -> None:
    values = measure(PROMPT, response)
    assert set(values) == {*MEASURES, "general"}
    assert all(0.0 <= value <= 1.0 for value in values.values())


def test_lexical_measures_need_no_download_and_the_package_stays_light() -> None:
    code = (
        "import sys\n"
        "import morlaif_ray.feedback\n"
        "heavy = {'openai', 'textstat', 'nltk', 'vaderSentiment', 'ray', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "from morlaif_ray.feedback.measures import measure\n"
        "print(measure('hi', 'hello there')['general'])\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
