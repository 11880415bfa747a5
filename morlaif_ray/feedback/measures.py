"""Lexical and structural measures per principle: what the `rules` judge looks at when there is no test-bed truth.

Contract: `measure(prompt, response)` gives one number in [0, 1] per principle, high = good, from the words alone.
These are stand-ins that a person can read and disagree with; each function's docstring is its definition. Libraries:
VADER for sentiment, textstat for the readability index that needs no dictionary (the automated readability index counts
letters, words and sentences; those that count syllables would download one).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from morlaif_ray.feedback import lexicons

if TYPE_CHECKING:
    from collections.abc import Iterable

GENERAL = "general"
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_TURN = re.compile(r"\n\n(?:Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Reading:
    """What was found in one response. Counts are of words unless said otherwise."""

    text: str
    words: tuple[str, ...]
    content: frozenset[str]
    """Distinct words that are not stop words."""
    last_turn: frozenset[str]
    """Content words of the last human message."""
    earlier: frozenset[str]
    """Content words of the conversation before it."""
    prompt_is_risky: bool
    """The last human message speaks of wrongdoing."""
    sentiment: dict[str, float]
    """VADER's neg, neu, pos (shares) and compound in [-1, 1]."""
    grade: float
    """Automated readability index: about the school grade needed."""

    def share(self, lexicon: frozenset[str]) -> float:
        return sum(word in lexicon for word in self.words) / max(1, len(self.words))

    def phrases(self, phrases: Iterable[str]) -> int:
        """How many of the phrases stand in the text, as whole words."""
        padded = f" {' '.join(self.words)} "
        return sum(f" {phrase} " in padded for phrase in phrases)


@lru_cache(maxsize=1)
def _sentiment_analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@lru_cache(maxsize=1)
def _readability() -> Callable[[str], float]:
    import textstat

    index: Callable[[str], float] = textstat.automated_readability_index
    return index


def _content(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower())) - lexicons.STOP_WORDS


@lru_cache(maxsize=2048)
def _read_prompt(prompt: str) -> tuple[frozenset[str], frozenset[str], bool]:
    turns = [turn for turn in _TURN.split(prompt) if turn.strip()]
    last = turns[-1] if turns else ""
    words = frozenset(_WORD.findall(last.lower()))
    return _content(last), _content(" ".join(turns[:-1])), bool(words & lexicons.WRONGDOING)


def read(prompt: str, response: str) -> Reading:
    last_turn, earlier, risky = _read_prompt(prompt)
    text = response.strip()
    words = tuple(_WORD.findall(text.lower().replace("\u2019", "'")))
    sentiment = (
        _sentiment_analyzer().polarity_scores(text)
        if words
        else {"neg": 0.0, "pos": 0.0, "compound": 0.0}
    )
    grade = float(_readability()(text)) if words else 0.0
    content = frozenset(words) - lexicons.STOP_WORDS
    return Reading(text, words, content, last_turn, earlier, risky, sentiment, grade)


def _saturate(value: float, full: float) -> float:
    """0 at 0, 1 at `full` and beyond, concave between."""
    return min(1.0, math.log1p(max(value, 0.0)) / math.log1p(full))


def _overlap(words: frozenset[str], reference: frozenset[str]) -> float:
    """Share of the reference that is taken up; 0 for an empty reference."""
    return len(words & reference) / len(reference) if reference else 0.0


def _helpfulness(said: Reading) -> float:
    """Substance (content words up to 60), taking up the question, not evading it."""
    evades = min(1, said.phrases(lexicons.EVASIONS))
    return (
        0.5 * _saturate(len(said.content), 60)
        + 0.2 * _overlap(said.content, said.last_turn)
        + 0.3 * (1 - evades)
    )


def _ethicality(said: Reading) -> float:
    """Few words of wrongdoing; where the person asks about it, caution counts for the response."""
    caution = min(2, said.phrases(lexicons.CAUTIONS)) / 2
    harm = min(1.0, 12.0 * said.share(lexicons.WRONGDOING)) * (1.0 - 0.7 * caution)
    base = 0.6 * (1.0 - harm) + 0.15
    return base + 0.25 * (caution if said.prompt_is_risky else 0.4 + 0.6 * caution)


def _factuality(said: Reading) -> float:
    """Reasons, sources and measured claims; sweeping words count against. The weakest stand-in of all."""
    support = _saturate(said.phrases(lexicons.EVIDENCE), 4)
    numbers = min(1.0, sum(word[0].isdigit() for word in said.words) / 3)
    sweeping = min(1.0, 15.0 * said.share(lexicons.ABSOLUTES))
    return 0.4 + 0.35 * support + 0.15 * numbers - 0.4 * sweeping


def _toxicity(said: Reading) -> float:
    """Absence of insults and crude words, and of negative sentiment."""
    crude = min(1.0, 20.0 * said.share(lexicons.INSULTS))
    return 1.0 - 0.65 * crude - 0.35 * min(1.0, 2.0 * said.sentiment["neg"])


def _sycophancy(said: Reading) -> float:
    """Anti-sycophancy: agreement and flattery count against, correction counts for."""
    agrees = min(2, said.phrases(lexicons.AGREEMENT)) / 2
    corrects = min(2, said.phrases(lexicons.CORRECTION)) / 2
    return 0.55 - 0.5 * agrees + 0.4 * corrects


def _empathy(said: Reading) -> float:
    """Phrases of care, warm sentiment, turning to the person."""
    care = min(3, said.phrases(lexicons.EMPATHY)) / 3
    person = min(
        1.0, 8.0 * sum(word in ("you", "your") for word in said.words) / max(1, len(said.words))
    )
    return 0.6 * care + 0.25 * (said.sentiment["compound"] + 1.0) / 2.0 + 0.15 * person


def _relevance(said: Reading) -> float:
    """Taking up the content words of the last message; half for coverage, half for not wandering off."""
    if not said.content:
        return 0.0
    wandering = len(said.content & said.last_turn) / len(said.content)
    return 0.5 * _overlap(said.content, said.last_turn) + 0.5 * min(1.0, 3.0 * wandering)


def _context(said: Reading) -> float:
    """Taking up words from earlier in the conversation and from the last message, and asking back."""
    asks = 1.0 if "?" in said.text else 0.0
    earlier = min(1.0, 3.0 * _overlap(said.content, said.earlier))
    return 0.5 * earlier + 0.3 * min(1.0, 2.0 * _overlap(said.content, said.last_turn)) + 0.2 * asks


def _bias(said: Reading) -> float:
    """Groups of people named together with generalisations count against; words of fairness count for."""
    groups = min(1.0, 10.0 * said.share(lexicons.GROUPS))
    sweeping = min(2, said.phrases(lexicons.GENERALISATIONS)) / 2
    fair = min(2, said.phrases(lexicons.FAIRNESS)) / 2
    return (
        0.85 - 0.3 * groups * (1.0 - fair) - 0.35 * sweeping - 0.2 * groups * sweeping + 0.15 * fair
    )


def _understandability(said: Reading) -> float:
    """A readability index of grade 4 or less is best, 16 or more worst."""
    if not said.words:
        return 0.0
    return 1.0 - min(max(said.grade - 4.0, 0.0), 12.0) / 12.0


def _detail(said: Reading) -> float:
    """Distinct content words (up to 80), numbers, examples and steps."""
    numbers = min(3, sum(word[0].isdigit() for word in said.words)) / 3
    markers = min(3, said.phrases(lexicons.DETAIL_MARKERS)) / 3
    return 0.7 * _saturate(len(said.content), 80) + 0.1 * numbers + 0.2 * markers


def _conciseness(said: Reading) -> float:
    """Few words (1 up to 10, 0 from 200 on), few fillers, few repetitions."""
    if not said.words:
        return 0.0
    length = 1.0 - min(1.0, math.log(max(len(said.words), 10) / 10.0) / math.log(20.0))
    repetition = 1.0 - len(set(said.words)) / len(said.words)
    return (
        0.75 * length
        + 0.15 * (1.0 - min(1.0, 8.0 * said.share(lexicons.FILLERS)))
        + 0.1 * (1.0 - repetition)
    )


MEASURES: dict[str, Callable[[Reading], float]] = {
    "helpfulness": _helpfulness,
    "ethicality": _ethicality,
    "factuality": _factuality,
    "toxicity": _toxicity,
    "sycophancy": _sycophancy,
    "empathy": _empathy,
    "relevance": _relevance,
    "context": _context,
    "bias": _bias,
    "understandability": _understandability,
    "detail": _detail,
    "conciseness": _conciseness,
}


@lru_cache(maxsize=4096)  # a response is asked about in K principles and two orders in a row
def measure(prompt: str, response: str) -> dict[str, float]:
    """Every principle's measure in [0, 1], and "general": their plain mean. Treat the result as read-only."""
    said = read(prompt, response)
    values = {name: min(1.0, max(0.0, function(said))) for name, function in MEASURES.items()}
    values[GENERAL] = math.fsum(values.values()) / len(values)
    return values
