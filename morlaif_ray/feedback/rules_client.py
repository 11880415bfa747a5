"""The embedded judge: no network, no weights, and the manners of a real one.

It knows the log-odds of a question from a `LogOdds` function (lexical measures, or the test-bed's oracle), adds a taste
for the response shown first, and answers as a chat completion would: top-5 log-probabilities over spellings of A and B
and another token, now and then no A/B token at all, now and then a transient error. So the whole path of parsing,
retrying, debiasing and storing is exercised without a provider.

Contract: an answer is a function of the question's key and texts alone, so it depends on no order and no process. Noise
is drawn once per unordered pair and principle: swapping the responses swaps the answer, as with a real judge's opinion.
"""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist
from typing import Protocol

from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.prices import estimate_tokens

ANSWER_MASS = 0.96
"""Probability of A and B together; the rest goes to other tokens."""
UNUSUAL_SHARE = 0.05
"""Share of answers whose main spelling is an unusual one."""

# (main spelling, side spelling) of A and B; the side spelling holds SIDE_SHARE of the letter's probability.
_USUAL = (("A", " A"), ("B", " B"))
_UNUSUAL = ((("(A", "a"), ("(B", "b")), ((" A", "A."), (" B", "B.")), (("a", "A"), ("b", "B")))
SIDE_SHARE = 0.1
_LOG_MAIN = math.log(ANSWER_MASS * (1.0 - SIDE_SHARE))
_LOG_SIDE = math.log(ANSWER_MASS * SIDE_SHARE)
_LOG_REST = math.log(1.0 - ANSWER_MASS)
_NO_LETTER = {"I": -0.4, "Both": -1.6, "The": -2.5, "Neither": -3.0, "It": -4.0}
_INVERSE_CDF = NormalDist().inv_cdf


class LogOdds(Protocol):
    """What the judge really thinks: antisymmetric in the two responses, in nats."""

    def __call__(self, prompt: str, first: str, second: str, principle: str) -> float: ...


class RulesClient:
    """See the module. `position_bias` is in nats in favour of the response shown first."""

    def __init__(
        self, log_odds: LogOdds, *, position_bias: float, fault_share: float, model: str
    ) -> None:
        self._log_odds = log_odds
        self._position_bias = position_bias
        self._fault_share = fault_share
        self._model = model
        self._failed_once: set[bytes] = set()

    async def ask(self, question: Question) -> RawAnswer:
        # The key is a content hash: its bytes are as good as random, and the same in every process.
        draw = int.from_bytes(question.key[:6]) / 281474976710656.0
        share = self._fault_share
        tokens = int(estimate_tokens(question.prompt, question.first, question.second))
        if draw < share:
            return RawAnswer(_NO_LETTER, self._model, tokens, 1)
        if draw < 2.0 * share and question.key not in self._failed_once:
            self._failed_once.add(question.key)
            raise AttemptError(
                "server", "the embedded judge was told to fail now and then", retry_after_s=0.0
            )
        log_odds = self._position_bias + self._log_odds(
            question.prompt, question.first, question.second, question.principle
        )
        letters = _USUAL
        if draw > 1.0 - UNUSUAL_SHARE:
            letters = _UNUSUAL[question.key[7] % len(_UNUSUAL)]
        return RawAnswer(top_logprobs(log_odds, letters), self._model, tokens, 1)

    async def close(self) -> None:
        return None


def top_logprobs(
    log_odds: float, letters: tuple[tuple[str, str], tuple[str, str]] = _USUAL
) -> dict[str, float]:
    """Five tokens whose summed spellings of A and B have exactly these log-odds."""
    log_a = -_softplus(-log_odds)
    log_b = log_a - log_odds
    (main_a, side_a), (main_b, side_b) = letters
    return {
        main_a: _LOG_MAIN + log_a,
        main_b: _LOG_MAIN + log_b,
        side_a: _LOG_SIDE + log_a,
        side_b: _LOG_SIDE + log_b,
        "The": _LOG_REST,
    }


def pair_noise(seed: int, principle: str, prompt: str, first: str, second: str) -> float:
    """A standard normal number, fixed for the unordered pair; swapping the responses flips its sign."""
    if first == second:
        return 0.0
    low, high = (first, second) if first < second else (second, first)
    material = (
        f"{seed}\x00{principle}\x00{len(prompt)}\x00{len(low)}\x00{prompt}\x00{low}\x00{high}"
    )
    digest = hashlib.sha256(material.encode("utf-8", "surrogatepass")).digest()
    value = _INVERSE_CDF((int.from_bytes(digest[:6]) + 0.5) / 281474976710656.0)
    return value if first == low else -value


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
