"""What a pair will cost: counted by hand for 2 principles and the overall question."""

from __future__ import annotations

import pytest

from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.feedback.forecasting import forecast_pair

pytestmark = pytest.mark.unit
ONE = 600 / 3.0 + 150.0  # characters / 3, and 150 for template, phrase and chat


def feedback(**changes: object) -> FeedbackConfig:
    judge = {"kind": "openai", "model": "m", **changes.pop("judge", {})}  # type: ignore[dict-item]
    return FeedbackConfig.model_validate({"judge": judge, **changes})


def test_each_question_is_a_request_of_one_answer_token() -> None:
    found = forecast_pair(feedback(), 2, 600.0)
    assert (found.questions, found.requests, found.completion_tokens) == (6, 6, 6.0)
    assert found.prompt_tokens == pytest.approx(6 * ONE)
    assert forecast_pair(feedback(orders="random"), 2, 600.0).requests == 3


def test_joint_requests_are_fewer_and_their_check_is_counted() -> None:
    found = forecast_pair(feedback(joint=2, joint_check_share=0.0), 2, 600.0)
    assert (found.questions, found.requests) == (6, 4)
    assert found.completion_tokens == 2 * (48 + 1)  # a JSON object of two fields, and one letter
    checked = forecast_pair(feedback(joint=2, joint_check_share=0.5), 2, 600.0)
    assert checked.prompt_tokens - found.prompt_tokens == pytest.approx(3 * ONE)


def test_reasoning_system_prompt_and_examples_are_counted() -> None:
    reasoning = forecast_pair(feedback(judge={"reasoning": {"max_tokens": 200}}), 2, 600.0)
    assert reasoning.completion_tokens == 6 * 200
    prompted = forecast_pair(feedback(judge={"system_prompt": "y" * 300}), 2, 600.0)
    assert prompted.prompt_tokens == pytest.approx(6 * (ONE + 100))
