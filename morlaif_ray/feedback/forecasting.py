"""What one pair will cost, before the first request: the same arithmetic as the budget, on texts of a mean length."""

from __future__ import annotations

from dataclasses import dataclass

from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.feedback.client import Question
from morlaif_ray.feedback.joint import ALONE, joint_groups, joint_question
from morlaif_ray.feedback.judges import answer_tokens
from morlaif_ray.feedback.prices import estimate_tokens
from morlaif_ray.feedback.prompting import prompter_for

PHRASE = "Which of the two responses is more helpful to the person?"
"""Stands for a principle's phrase: of usual length."""


@dataclass(frozen=True, slots=True)
class PairForecast:
    """Both orders, all questions about one pair, rather too much than too little."""

    questions: int
    requests: int
    prompt_tokens: float
    completion_tokens: float


def forecast_pair(feedback: FeedbackConfig, num_principles: int, pair_chars: float) -> PairForecast:
    """`pair_chars`: mean characters of prompt and both responses. The sample of `joint_check_share` is included."""
    principles = (*((f"principle_{i}", PHRASE) for i in range(num_principles)), (ALONE, PHRASE))
    num_orders = 2 if feedback.orders == "both" else 1
    fixed = prompter_for(feedback).head_tokens
    text = "x" * int(pair_chars)
    requests, prompt, completion = 0.0, 0.0, 0.0

    def add(joint: int, times: float) -> None:
        nonlocal requests, prompt, completion
        for group in joint_groups(principles, joint):
            asked = joint_question([_question(text, *principles[column]) for column in group])
            requests += times
            # `estimate_tokens` has room for one phrase, not for the list of a joint request.
            phrases = asked.phrase if asked.members else ""
            prompt += times * (estimate_tokens(asked.prompt, phrases) + fixed)
            completion += times * answer_tokens(feedback.judge, asked)

    add(feedback.joint, num_orders)
    if feedback.joint > 1:
        add(1, 2 * feedback.joint_check_share)
    return PairForecast(len(principles) * num_orders, round(requests), prompt, completion)


def _question(text: str, name: str, phrase: str) -> Question:
    return Question(text, "", "", name, phrase, "ab", b"")
