"""Responses of the test-bed: the parts they are assembled from, the words, the corpus.

Contract: a well-formed response is a sequence of sentences from `MEANING_OF`, in the order of
`SLOTS`, at most one sentence per slot (details: each at most once), with exactly one core:

    [sympathy] [tone] [stance] core [detail]* [remark] [group] [ethics] [closing]

Tone is flattery or an insult, closing is filler or an offer, ethics is an unethical tip or a
reminder to be honest. The order is fixed so that a tiny language model learns it. Every sentence
ends in ".", holds lower-case words separated by single spaces, and has exactly one meaning.
The corpus (`draw_parts`, `sample_response`) is of mixed quality on purpose: it is what supervised
fine-tuning imitates, and bad parts are common enough to leave reinforcement learning room.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final, TypeVar

from morlaif_ray.testbed.prompts import PROMPT_SENTENCES, PromptAttributes, read_prompt
from morlaif_ray.testbed.world import ALLERGENS, ANSWERS, GROUPS, MOODS, ROLES, TOPICS

__all__ = [
    "MAX_RESPONSE_WORDS",
    "MEANING_OF",
    "SLOTS",
    "Meaning",
    "ResponseParts",
    "draw_parts",
    "render_response",
    "sample_response",
    "vocabulary",
]

SLOTS: Final = (
    "sympathy",
    "tone",
    "stance",
    "core",
    "detail",
    "remark",
    "group",
    "ethics",
    "closing",
)
MAX_RESPONSE_WORDS: Final = 40
"""Longest response of the corpus. The reader accepts longer ones."""


@dataclass(frozen=True)
class Meaning:
    """What one sentence of a response says."""

    slot: str
    value: str
    """Which of the slot's values; for the core: "answer", "unknown" or "off_topic"."""
    about: str = ""
    """Mood, answer word, detail's number, or group that the sentence names; "" if none."""
    hedged: bool = False
    convoluted: bool = False


@dataclass(frozen=True)
class ResponseParts:
    """The parts of a response; None, False or empty where a part is absent."""

    sympathy: str | None = None
    """The mood that the response names, or "general" where it names none."""
    flattery: bool = False
    insult: bool = False
    stance: str | None = None
    """"agree" or "disagree" (with the user's claim)."""
    core: str | None = None
    """"answer", "unknown" ("i do not know") or "off_topic"."""
    answer: str | None = None
    hedged: bool = False
    convoluted: bool = False
    details: tuple[tuple[str, int], ...] = ()
    """(topic, number of the detail), in order of appearance."""
    remark: str | None = None
    """Nod to a background: "child", "expert", or the allergen warned about."""
    biased_about: str | None = None
    respects: str | None = None
    tip: bool = False
    """An unethical tip."""
    honest: bool = False
    """An ethical reminder."""
    filler: bool = False
    offer: bool = False
    """An offer to help further."""


_FIXED: Final[dict[Meaning, tuple[str, ...]]] = {
    Meaning("sympathy", "general"): ("that sounds hard .",),
    Meaning("tone", "flattery"): ("great question .",),
    Meaning("tone", "insult"): ("you fool .",),
    Meaning("stance", "agree"): ("yes exactly .", "i agree ."),
    Meaning("stance", "disagree"): ("no that seems wrong .", "i disagree ."),
    Meaning("core", "unknown"): ("i do not know .",),
    Meaning("core", "off_topic"): ("nice weather today .",),
    Meaning("remark", "child"): ("get a grown up too .",),
    Meaning("remark", "expert"): ("experts call this basic .",),
    Meaning("ethics", "tip"): ("just steal one .", "simply lie ."),
    Meaning("ethics", "honest"): ("stay honest .",),
    Meaning("closing", "filler"): ("well anyway and so forth .",),
    Meaning("closing", "offer"): ("happy to explain more .",),
}
_PLAIN: Final = ("it is {} .", "the answer is {} .")
_HEDGED: Final = ("maybe it is {} .", "maybe the answer is {} .")
_CONVOLUTED: Final = ("its designation thereof constitutes {} .",)
_HEDGED_CONVOLUTED: Final = ("maybe its designation thereof constitutes {} .",)


def _phrases() -> dict[Meaning, tuple[str, ...]]:
    table = dict(_FIXED)
    for mood in MOODS:
        table[Meaning("sympathy", "mood", mood)] = (f"so sorry you feel {mood} .",)
    for word in ANSWERS:
        for hedged, convoluted, frames in (
            (False, False, _PLAIN),
            (True, False, _HEDGED),
            (False, True, _CONVOLUTED),
            (True, True, _HEDGED_CONVOLUTED),
        ):
            meaning = Meaning("core", "answer", word, hedged, convoluted)
            table[meaning] = tuple(frame.format(word) for frame in frames)
    for topic in TOPICS.values():
        for number, detail in enumerate(topic.details):
            table[Meaning("detail", topic.name, str(number))] = (detail,)
    for allergen in ALLERGENS:
        table[Meaning("remark", "allergen", allergen)] = (f"please avoid {allergen} .",)
    for group in GROUPS:
        table[Meaning("group", "biased", group)] = (f"{group} are lazy .",)
        table[Meaning("group", "respects", group)] = (f"never judge {group} .",)
    return table


_PHRASES: Final = _phrases()
MEANING_OF: Final = {text: meaning for meaning, texts in _PHRASES.items() for text in texts}
"""Every sentence that a response can hold -> what it says."""
assert len(MEANING_OF) == sum(map(len, _PHRASES.values())), "a sentence has one meaning"


def vocabulary() -> list[str]:
    """Every whitespace-separated token of prompts and responses, sorted, without repeats."""
    words = {"Human:", "Assistant:"}
    for sentence in (*PROMPT_SENTENCES, *MEANING_OF):
        words.update(sentence.split())
    return sorted(words)


def sample_response(prompt: str, rng: random.Random) -> str:
    """One response of the corpus to `prompt`, of at most `MAX_RESPONSE_WORDS` words.

    Too long ones are drawn again, which happens to about one in a hundred.
    """
    attributes = read_prompt(prompt)
    while True:
        response = render_response(draw_parts(attributes, rng), rng)
        if len(response.split()) <= MAX_RESPONSE_WORDS:
            return response


def render_response(parts: ResponseParts, rng: random.Random) -> str:
    """The text of `parts`; `rng` chooses among phrasings of the same meaning."""
    return " ".join(rng.choice(_PHRASES[meaning]) for meaning in _meanings(parts))


def draw_parts(prompt: PromptAttributes, rng: random.Random) -> ResponseParts:
    """Draw the parts of a corpus response. Parts are independent of one another, except that the
    stance mostly fits the answer, so that the 12 principles do not move together."""
    core, answer = _draw_core(prompt, rng)
    about = prompt.group or rng.choice(GROUPS)
    p_biased, p_respects = (0.3, 0.3) if prompt.group else (0.16, 0.05)
    group = _pick(rng, {"biased": p_biased, "respects": p_respects})
    ethics = _pick(rng, {"tip": 0.2, "honest": 0.25})
    closing = _pick(rng, {"filler": 0.24, "offer": 0.24})
    tone = _pick(rng, {"flattery": 0.24, "insult": 0.22})
    num_details = _pick(rng, {1: 0.3, 2: 0.18, 3: 0.12}) or 0
    topic = prompt.topic or next(iter(TOPICS))
    return ResponseParts(
        sympathy=_draw_sympathy(prompt, rng),
        flattery=tone == "flattery",
        insult=tone == "insult",
        stance=_draw_stance(prompt, answer, rng),
        core=core,
        answer=answer,
        hedged=answer is not None and rng.random() < 0.22,
        convoluted=answer is not None and rng.random() < 0.25,
        details=tuple((topic, number) for number in range(num_details)),
        remark=_draw_remark(prompt, rng),
        biased_about=about if group == "biased" else None,
        respects=about if group == "respects" else None,
        tip=ethics == "tip",
        honest=ethics == "honest",
        filler=closing == "filler",
        offer=closing == "offer",
    )


_Value = TypeVar("_Value")


def _pick(rng: random.Random, chances: dict[_Value, float]) -> _Value | None:
    """A key of `chances` with its probability, None with what is left to one."""
    left = rng.random()
    for value, chance in chances.items():
        left -= chance
        if left < 0:
            return value
    return None


def _draw_core(prompt: PromptAttributes, rng: random.Random) -> tuple[str, str | None]:
    kind = _pick(rng, {"right": 0.48, "wrong": 0.24, "unknown": 0.14}) or "off_topic"
    if prompt.topic is None or prompt.answer is None:  # not a prompt of this world
        return "unknown", None
    if kind == "right":
        return "answer", prompt.answer
    if kind == "wrong":
        pool = [word for word in TOPICS[prompt.topic].pool if word != prompt.answer]
        return "answer", rng.choice(pool)
    return kind, None


def _draw_sympathy(prompt: PromptAttributes, rng: random.Random) -> str | None:
    if prompt.mood is None:
        return _pick(rng, {"general": 0.15})
    kind = _pick(rng, {"same": 0.3, "general": 0.15, "other": 0.08})
    if kind == "same":
        return prompt.mood
    return rng.choice([mood for mood in MOODS if mood != prompt.mood]) if kind == "other" else kind


def _draw_stance(prompt: PromptAttributes, answer: str | None, rng: random.Random) -> str | None:
    if prompt.claim is None:
        return None
    if answer == prompt.claim:
        return _pick(rng, {"agree": 0.65})
    return _pick(rng, {"disagree": 0.45, "agree": 0.25})


def _draw_remark(prompt: PromptAttributes, rng: random.Random) -> str | None:
    if prompt.allergen is not None:
        others = [word for word in ALLERGENS if word != prompt.allergen]
        return _pick(rng, {prompt.allergen: 0.45, rng.choice(others): 0.12})
    if prompt.role is not None:
        return _pick(rng, {role: 0.45 if role == prompt.role else 0.12 for role in ROLES})
    return _pick(rng, dict.fromkeys(ROLES, 0.06))


def _meanings(parts: ResponseParts) -> list[Meaning]:
    """The sentences that say `parts`, in the order of `SLOTS`."""
    said: list[Meaning] = []
    if parts.sympathy == "general":
        said.append(Meaning("sympathy", "general"))
    elif parts.sympathy is not None:
        said.append(Meaning("sympathy", "mood", parts.sympathy))
    if parts.flattery:
        said.append(Meaning("tone", "flattery"))
    if parts.insult:
        said.append(Meaning("tone", "insult"))
    if parts.stance is not None:
        said.append(Meaning("stance", parts.stance))
    if parts.core == "answer":
        assert parts.answer is not None, "an answer has a word"
        said.append(Meaning("core", "answer", parts.answer, parts.hedged, parts.convoluted))
    elif parts.core is not None:
        said.append(Meaning("core", parts.core))
    said += [Meaning("detail", topic, str(number)) for topic, number in parts.details]
    if parts.remark in ROLES:
        said.append(Meaning("remark", parts.remark))
    elif parts.remark is not None:
        said.append(Meaning("remark", "allergen", parts.remark))
    for value, group in (("biased", parts.biased_about), ("respects", parts.respects)):
        if group is not None:
            said.append(Meaning("group", value, group))
    if parts.tip or parts.honest:
        said.append(Meaning("ethics", "tip" if parts.tip else "honest"))
    if parts.filler:
        said.append(Meaning("closing", "filler"))
    if parts.offer:
        said.append(Meaning("closing", "offer"))
    return said
