"""From the answer token's log-probabilities to log-odds of A over B.

The answer token is the first one or, after reasoning, the letter of the last answer marker. A judge spreads its answer
over spellings ("A", " A", "(A", "a"); their probabilities are summed. Nothing is guessed: an answer that does not name
both letters has no log-odds, only a reason (ALGORITHMS.md section 1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeGuard

from morlaif_ray.feedback.client import RawAnswer

NAN = float("nan")
ABSENT_LOGPROB = -1000.0
"""Some providers write -9999 for a token that was not among the top ones; that is absence, not a probability."""

HARD_LOG_ODDS = 2.0
"""Nats that a bare A or B counts for, where a judge gives no log-probabilities: "right in 88 of 100 cases"."""

MOST_SURE = 0.98
"""A judge's stated 0 or 100 is read as "right in 98 of 100 cases": 3.9 nats."""

# A lower-case "a" is an article unless nothing follows it on its line.
_LETTER = r"([AB](?!\w)|[ab](?=[^\w\n]*$))"
_MARKER = re.compile(
    rf"(?i:answer)[^\w\n]*:\W*{_LETTER}|(?i:answer\s+is)[^\w\n]*{_LETTER}", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """One answer as numbers. Produced here, stored in the ledger, consumed by `combining`."""

    log_odds: float
    """logP(A) - logP(B) in nats: for the response shown first. NaN when a letter is missing."""
    mass: float
    """Probability of all spellings of A and B together, in [0, 1]; 0 when neither was there."""
    reason: str
    """Why there are no log-odds; empty when there are."""


@lru_cache(maxsize=4096)
def letter_of(token: str) -> str:
    """ "A" or "B" for any spelling of the bare letter, "" for every other token."""
    bare = (
        token.replace("\u2581", " ")
        .replace("\u0120", " ")
        .strip(" \t\r\n()[]{}<>\"'`*_.:,;-")
        .upper()
    )
    return bare if bare in ("A", "B") else ""


def parse_answer(answer: RawAnswer) -> ParsedAnswer:
    """Sums the spellings of each letter by log-sum-exp. Never raises: what cannot be read carries a reason."""
    if answer.refusal:
        return ParsedAnswer(NAN, 0.0, "the judge refused")
    if answer.problem:
        return ParsedAnswer(NAN, 0.0, answer.problem)
    if not answer.top_logprobs:
        return ParsedAnswer(NAN, 0.0, "no log-probabilities in the answer")
    sum_a = sum_b = 0.0
    for token, logprob in answer.top_logprobs.items():
        letter = letter_of(token)
        if not letter or not logprob > ABSENT_LOGPROB:  # "not >" drops NaN too
            continue
        # Sums of exp are safe here: log-probabilities are <= 0, and below -745 exp() is a true 0 probability.
        if letter == "A":
            sum_a += math.exp(logprob)
        else:
            sum_b += math.exp(logprob)
    mass = min(1.0, sum_a + sum_b)
    if sum_a > 0.0 and sum_b > 0.0:
        return ParsedAnswer(math.log(sum_a) - math.log(sum_b), mass, "")
    if mass == 0.0:
        return ParsedAnswer(NAN, 0.0, "neither A nor B among the top tokens")
    missing = "A" if sum_a == 0.0 else "B"
    return ParsedAnswer(NAN, mass, f"{missing} is not among the top tokens")


def hard_logprobs(letter: str) -> dict[str, float]:
    """Log-probabilities whose log-odds are +-HARD_LOG_ODDS, for an answer that is only a letter."""
    chosen = -math.log1p(math.exp(-HARD_LOG_ODDS))
    other = "B" if letter == "A" else "A"
    return {letter: chosen, other: chosen - HARD_LOG_ODDS}


def strength_logprobs(strength: float) -> dict[str, float]:
    """Log-probabilities for a stated strength, 0 (surely B) to 100 (surely A); no answer is surer than MOST_SURE."""
    share = min(MOST_SURE, max(1.0 - MOST_SURE, strength / 100.0))
    return {"A": math.log(share), "B": math.log1p(-share)}


def final_answer_token(tokens: Sequence[str]) -> int | None:
    """Index of the token that holds the letter of the last answer marker ("Answer: B"); None without a marker.

    `tokens` are the texts of the generated tokens in order.
    """
    matches = list(_MARKER.finditer("".join(tokens)))
    if not matches:
        return None
    last = matches[-1]
    place = last.start(1) if last.group(1) else last.start(2)
    end = 0
    for index, token in enumerate(tokens):
        end += len(token)
        if place < end:
            return index
    return None


def read_choices(
    content: str, names: Sequence[str], strengths: bool = False
) -> tuple[dict[str, dict[str, float]], str]:
    """({name: log-probabilities}, problem) from a JSON object of letters or, with `strengths`, of numbers 0 to 100.

    Where letters were asked for, a number is no answer: a 1 may mean "response 1" as well as "surely B". Names without
    an answer are absent from the first.
    """
    try:
        found = json.loads(content)
    except ValueError:
        return {}, "the answer is not the JSON object asked for"
    if not isinstance(found, dict):
        return {}, "the answer is not the JSON object asked for"
    chosen: dict[str, dict[str, float]] = {}
    for name in names:
        value = found.get(name)
        if isinstance(value, str) and letter_of(value):
            chosen[name] = hard_logprobs(letter_of(value))
        elif strengths and _is_strength(value):
            chosen[name] = strength_logprobs(value)
    return chosen, ""


def _is_strength(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100
