"""Who is better, asked in both orders: by the run's own judge, or by the test-bed's truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.context import JobContext
from morlaif_ray.seeding import stable_hash
from morlaif_ray.types import FloatArray, ResponsePair

ORACLE_TIE = 1e-9
"""Utilities closer than this are equal: the two responses hold the same parts."""


@dataclass(frozen=True)
class Verdicts:
    """Log-odds (nats) that the policy's response beats the opponent's, per prompt, in both orders."""

    policy: str
    opponent: str
    log_odds_ab_N: FloatArray
    """The policy's response shown first."""
    log_odds_ba_N: FloatArray
    """The policy's response shown second; still positive when the policy's is better."""
    tie_threshold: float
    judge: str


def oracle_verdicts(
    responses: dict[str, list[Any]], pairs: Sequence[tuple[str, str]]
) -> list[Verdicts]:
    """True utility differences. The truth has no position bias, so both orders are the same number."""
    utility = np.array(responses["oracle_utility"], dtype=np.float64)
    owner = np.array(responses["policy"])
    found = []
    for policy, opponent in pairs:
        difference = utility[owner == policy] - utility[owner == opponent]
        found.append(
            Verdicts(policy, opponent, difference, difference, ORACLE_TIE, "oracle (true utility)")
        )
    return found


def judge_verdicts(
    context: JobContext, responses: dict[str, list[Any]], pairs: Sequence[tuple[str, str]]
) -> list[Verdicts]:
    """Asks the judge of section `feedback` which response is better overall; answers are kept in the run's ledger."""
    from jobs.ask_judge import ask_judge
    from morlaif_ray.feedback.judges import recipe_for
    from morlaif_ray.feedback.questions import plan_questions

    config = context.config
    recipe = recipe_for(config.feedback, config.seed)
    plan = plan_questions([], orders="both", seed=config.seed, recipe=recipe)
    owners = responses["policy"]
    names = {name for pair in pairs for name in pair}
    rows = {name: [i for i, owner in enumerate(owners) if owner == name] for name in names}
    duels = [
        (policy, opponent, _duel(responses, mine, theirs))
        for policy, opponent in pairs
        for mine, theirs in zip(rows[policy], rows[opponent], strict=True)
    ]
    # Equal responses are a tie without a question.
    asked = {duel.pair_id: duel for _, _, duel in duels if duel.response_a != duel.response_b}
    ledger_path = config.feedback.ledger_path or context.path("ledger", "feedback.sqlite")
    batches, outcomes = ask_judge(
        context, list(asked.values()), plan, ledger_path.absolute(), title="win rates"
    )
    answers: dict[str, tuple[float, float]] = {}
    for batch, outcome in zip(batches, outcomes, strict=True):
        for number, pair in enumerate(batch.pairs):
            ab, ba = outcome.log_odds_N[number * plan.per_pair : (number + 1) * plan.per_pair]
            # Both are for the response shown first; in the second order that is the opponent's.
            answers[pair.pair_id] = (float(ab), -float(ba))
    return _collect(
        pairs, duels, answers, config.feedback.tie_threshold, config.feedback.judge.kind
    )


def _duel(responses: dict[str, list[Any]], mine: int, theirs: int) -> ResponsePair:
    prompt, first, second = (
        responses["prompt"][mine],
        responses["response"][mine],
        responses["response"][theirs],
    )
    return ResponsePair(
        pair_id=stable_hash(prompt, first, second)[:24],
        prompt_id=responses["prompt_id"][mine],
        prompt=prompt,
        response_a=first,
        response_b=second,
        split="test",
        human_label=float("nan"),
    )


def _collect(
    pairs: Sequence[tuple[str, str]],
    duels: Sequence[tuple[str, str, ResponsePair]],
    answers: dict[str, tuple[float, float]],
    tie_threshold: float,
    judge: str,
) -> list[Verdicts]:
    found = []
    for policy, opponent in pairs:
        mine = [duel for p, o, duel in duels if (p, o) == (policy, opponent)]
        values = np.array([_answer(duel, answers) for duel in mine], dtype=np.float64)
        found.append(Verdicts(policy, opponent, values[:, 0], values[:, 1], tie_threshold, judge))
    return found


def _answer(duel: ResponsePair, answers: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Equal responses are a tie; a duel that the judge left unanswered is missing, not a tie."""
    if duel.response_a == duel.response_b:
        return 0.0, 0.0
    return answers.get(duel.pair_id, (float("nan"), float("nan")))
