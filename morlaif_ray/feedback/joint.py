"""Joint mode: several principles in one structured request, and how far its answers agree with separate questions.

    members -> joint_question -> one JSON object {principle: "A" or "B", or 0 to 100} -> one answer per member

It costs one prompt instead of N, and the answers may rub off on one another: what that does is measured on a sample of
pairs that are asked separately too (`agreement_with_separate`). A joint answer is a letter, so a hard label, or a
strength that the judge states, so a soft one (`feedback.joint_answer`). "general" is always asked alone. A member's
ledger key holds the names and phrases of its whole group, so a joint answer is never taken for a separate one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from morlaif_ray.feedback.client import Question, RawAnswer
from morlaif_ray.seeding import stable_hash, unit_interval
from morlaif_ray.types import Interval, Judgement, ResponsePair

ALONE = "general"
JOINT = "joint"
"""Stands as the principle's name in a joint request."""
STRENGTH = "joint strength"
MIN_CORRELATED = 3

_PHRASE = """\
Answer each of these questions about the two responses on its own:
{lines}
Answer with one JSON object that gives "A" or "B" for each name: {names}."""
_STRENGTH_PHRASE = """\
Answer each of these questions about the two responses on its own:
{lines}
Answer with one JSON object that gives a whole number for each name: 0 if surely B, 50 if neither, 100 if surely A, \
numbers between for how sure you are. Names: {names}."""


@lru_cache(maxsize=64)
def joint_groups(
    principles: tuple[tuple[str, str], ...], joint: int
) -> tuple[tuple[int, ...], ...]:
    """Columns that are asked in one request: at most `joint` each, in column order, "general" alone."""
    together = [column for column, (name, _) in enumerate(principles) if name != ALONE]
    groups = [tuple(together[i : i + joint]) for i in range(0, len(together), joint)]
    groups += [(column,) for column, (name, _) in enumerate(principles) if name == ALONE]
    assert [column for group in groups for column in group] == list(range(len(principles)))
    return tuple(groups)


@lru_cache(maxsize=64)
def column_recipes(
    recipe: str, principles: tuple[tuple[str, str], ...], joint: int, strengths: bool = False
) -> tuple[str, ...]:
    """The recipe in each column's key: beside which other phrases it is asked can change an answer."""
    recipes = [recipe] * len(principles)
    for group in joint_groups(principles, joint):
        if len(group) > 1:
            asked = [part for column in group for part in principles[column]]
            joined = stable_hash(recipe, STRENGTH if strengths else JOINT, *asked)
            for column in group:
                recipes[column] = joined
    return tuple(recipes)


def joint_question(members: Sequence[Question]) -> Question:
    """One request for all members (same pair, same order); a single member is asked as it is."""
    if len(members) == 1:
        return members[0]
    phrase = (_STRENGTH_PHRASE if members[0].strength else _PHRASE).format(
        lines="\n".join(f"- {member.principle}: {member.phrase}" for member in members),
        names=", ".join(member.principle for member in members),
    )
    key = hashlib.sha256(b"".join(member.key for member in members)).digest()[:16]
    return dataclasses.replace(
        members[0], principle=JOINT, phrase=phrase, key=key, members=tuple(members)
    )


def answers_for(answer: RawAnswer, wanted: Sequence[bool]) -> list[RawAnswer]:
    """The members' answers that are wanted; what the request cost stands on the first of these."""
    parts = answer.parts or (answer,)
    found = [part for part, want in zip(parts, wanted, strict=True) if want]
    if found:
        found[0] = dataclasses.replace(
            found[0],
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cached_tokens=answer.cached_tokens,
        )
    return found


def check_sample(pairs: Sequence[ResponsePair], share: float, seed: int) -> list[ResponsePair]:
    """The pairs that are asked separately too: drawn by content, at least one where share > 0."""
    if share == 0.0 or not pairs:
        return []
    ranked = sorted(pairs, key=lambda pair: unit_interval(seed, "joint_check", pair.pair_id))
    chosen = {pair.pair_id for pair in ranked[: max(1, round(share * len(pairs)))]}
    return [pair for pair in pairs if pair.pair_id in chosen]


def agreement_with_separate(
    joint: Sequence[Judgement], separate: Sequence[Judgement], num_pairs: int
) -> dict[str, Any]:
    """`joint_agreement` of summary.json: share of equal signs where both kinds of question gave a decision.

    {num_pairs, num_compared, agreement, low, high, num_ties, num_missing, correlation, mean_gap, by_principle: {name:
    {agreement, num}}}. `correlation` (Pearson, of the log-odds) and `mean_gap` (of the probabilities that response_a is
    better) tell more than signs do, over all that both kinds answered, ties included.
    """
    asked = {(entry.pair_id, entry.principle): entry for entry in joint}
    counts: dict[str, list[int]] = {}
    ties = missing = 0
    both: list[tuple[float, float]] = []
    for entry in separate:
        other = asked.get((entry.pair_id, entry.principle))
        if other is None or entry.principle in (ALONE, "random"):
            continue
        statuses = {entry.status, other.status}
        if statuses <= {"ok", "tie"}:
            both.append((other.log_odds, entry.log_odds))
        if statuses == {"ok"}:
            agree, num = counts.setdefault(entry.principle, [0, 0])
            same = (entry.log_odds > 0.0) == (other.log_odds > 0.0)
            counts[entry.principle] = [agree + same, num + 1]
        elif statuses <= {"ok", "tie"}:
            ties += 1
        else:
            missing += 1
    total = _share(counts.values())
    return {
        "num_pairs": num_pairs,
        "num_compared": total.num,
        "agreement": total.value,
        "low": total.low,
        "high": total.high,
        "num_ties": ties,
        "num_missing": missing,
        "correlation": _correlation(both),
        "mean_gap": _mean_gap(both),
        "by_principle": _by_principle(counts),
    }


def _correlation(both: Sequence[tuple[float, float]]) -> float:
    """Pearson's; NaN for fewer than MIN_CORRELATED pairs or where one side never varies."""
    if len(both) < MIN_CORRELATED:
        return math.nan
    try:
        return statistics.correlation(*zip(*both, strict=True))
    except statistics.StatisticsError:
        return math.nan


def _mean_gap(both: Sequence[tuple[float, float]]) -> float:
    gaps = [abs(_probability(joint) - _probability(separate)) for joint, separate in both]
    return math.fsum(gaps) / len(gaps) if gaps else math.nan


def _probability(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, log_odds))))


def _by_principle(counts: Mapping[str, Sequence[int]]) -> dict[str, dict[str, float | int]]:
    return {
        name: {"agreement": agree / num if num else math.nan, "num": num}
        for name, (agree, num) in counts.items()
    }


def _share(counts: Any) -> Interval:
    from morlaif_ray.feedback.analysis import wilson_interval

    entries = list(counts)
    return wilson_interval(sum(agree for agree, _ in entries), sum(num for _, num in entries))
