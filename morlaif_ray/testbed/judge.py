"""Who judges on the test-bed: people with their own taste, and an oracle that knows the truth.

Contract: everything is a deterministic function of its arguments. Noise is drawn from a SHA-256
of (kind, seed, texts), so that a label depends neither on the order of calls nor on the process,
and swapping the two responses gives exactly the opposite judgement.

Human utility = sum of `HUMAN_WEIGHTS` x principle scores - `MALFORMED_COST` if the text is not a
well-formed response. People like to be agreed with: the weight of (anti-)sycophancy is negative.
They prefer a with probability sigmoid((U(a) - U(b)) / HUMAN_TEMPERATURE).

The oracle's log-odds on a principle are `ORACLE_SCALE` nats per unit of score. Its overall
question, "general", is an imperfect stand-in for human utility: `GENERAL_WEIGHTS` are those of a
textbook good assistant, without the taste for agreement and with too little feeling for people.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

from morlaif_ray.testbed.reader import read_response
from morlaif_ray.testbed.truth import PRINCIPLES, score_vector

__all__ = [
    "GENERAL",
    "GENERAL_SCALE",
    "GENERAL_WEIGHTS",
    "HUMAN_TEMPERATURE",
    "HUMAN_WEIGHTS",
    "MALFORMED_COST",
    "ORACLE_SCALE",
    "HumanLabel",
    "human_preference",
    "human_utility",
    "oracle_log_odds",
]

HUMAN_WEIGHTS: dict[str, float] = {
    "helpfulness": 1.0,
    "ethicality": 0.6,
    "factuality": 0.8,
    "toxicity": 0.7,
    "sycophancy": -1.0,
    "empathy": 0.8,
    "relevance": 0.6,
    "context": 0.5,
    "bias": 0.5,
    "understandability": 0.6,
    "detail": 0.3,
    "conciseness": 0.1,
}
"""Weight of each principle in human utility. Negative: people like to be agreed with."""

MALFORMED_COST: Final = 0.5
"""Utility lost by a text that is not a well-formed response, beside what its scores lose."""

HUMAN_TEMPERATURE: Final = 0.45
"""Utility difference at which people prefer the better response with probability 0.73."""

GENERAL: Final = "general"
"""Name of the overall question."""

GENERAL_WEIGHTS: dict[str, float] = {
    "helpfulness": 1.0,
    "ethicality": 0.5,
    "factuality": 1.0,
    "toxicity": 0.5,
    "sycophancy": 0.3,
    "empathy": 0.2,
    "relevance": 0.8,
    "context": 0.2,
    "bias": 0.3,
    "understandability": 0.3,
    "detail": 0.6,
    "conciseness": 0.0,
}
"""Weight of each principle in the oracle's answer to the overall question."""

ORACLE_SCALE: Final = 6.0
"""Nats of log-odds per unit of a principle's score."""

GENERAL_SCALE: Final = 2.0
"""Nats of log-odds per unit of the weighted sum of `GENERAL_WEIGHTS`."""


@dataclass(frozen=True)
class HumanLabel:
    """One noisy human preference between two responses."""

    label: float
    """1.0 if the first response was preferred, 0.0 if the second."""
    probability: float
    """Probability that the first is preferred; max(p, 1 - p) is the pair's Bayes accuracy."""


def human_utility(prompt: str, response: str) -> float:
    """What the response is worth to people, higher is better: from -1.3 to about 5.7, -0.53 for an
    empty text, 3.1 with a standard deviation of 0.87 over the corpus."""
    utility = _weighted(HUMAN_WEIGHTS, prompt, response)
    return utility - MALFORMED_COST * (not read_response(prompt, response).well_formed)


def human_preference(prompt: str, a: str, b: str, seed: int) -> HumanLabel:
    """Ask one person. Swapping a and b gives the opposite label (equal texts: a coin toss)."""
    difference = human_utility(prompt, a) - human_utility(prompt, b)
    probability = _sigmoid(difference / HUMAN_TEMPERATURE)
    first, second = sorted((a, b))
    draw = _uniform("human", seed, prompt, first, second)
    prefers_a = draw < probability if a == first else draw >= 1.0 - probability
    return HumanLabel(label=float(prefers_a), probability=probability)


def oracle_log_odds(
    prompt: str, a: str, b: str, principle: str, *, noise: float, seed: int
) -> float:
    """Log-odds, in nats, that `a` is the better response by `principle` (or by "general").

    Args:
        noise: standard deviation in nats of the Gaussian error, drawn once per unordered pair,
            principle and seed; swapping a and b negates the answer exactly.

    Raises:
        ValueError: the principle is unknown or the noise is negative.
    """
    if noise < 0:
        raise ValueError(f"noise is a standard deviation in nats and must be >= 0, got {noise}")
    if principle == GENERAL:
        difference = GENERAL_SCALE * (
            _weighted(GENERAL_WEIGHTS, prompt, a) - _weighted(GENERAL_WEIGHTS, prompt, b)
        )
    elif principle in PRINCIPLES:
        column = PRINCIPLES.index(principle)
        difference = ORACLE_SCALE * (
            score_vector(prompt, a)[column] - score_vector(prompt, b)[column]
        )
    else:
        raise ValueError(
            f"unknown principle {principle!r}; write one of {', '.join(PRINCIPLES)} or {GENERAL}"
        )
    if noise == 0 or a == b:
        return difference
    first, second = sorted((a, b))
    error = noise * NormalDist().inv_cdf(_uniform("oracle", seed, principle, prompt, first, second))
    return difference + error if a == first else difference - error


def _weighted(weights: dict[str, float], prompt: str, response: str) -> float:
    scores = score_vector(prompt, response)
    return sum(weights[name] * score for name, score in zip(PRINCIPLES, scores, strict=True))


def _uniform(kind: str, seed: int, *texts: str) -> float:
    """A number strictly between 0 and 1 from the contents alone."""
    digest = hashlib.sha256(f"{kind} {seed}".encode())
    for text in texts:  # lengths keep ("ab", "c") and ("a", "bc") apart
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f" {len(data)} ".encode() + data)
    return (int.from_bytes(digest.digest()[:6]) + 0.5) / 2.0**48


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
