"""Few-shot examples: from the config or a YAML file to the messages before the question.

File: a YAML list of `{conversation, response_a, response_b, question, answer: A or B, reasoning (optional)}`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from morlaif_ray.config.judging import FeedbackConfig, FewShotExample
from morlaif_ray.errors import ConfigError
from morlaif_ray.feedback.template import AnswerStyle, fill

JOINT_EXAMPLE_NAME = "example"
"""The name of an example's only question in joint mode."""


def load_few_shot(source: Sequence[FewShotExample] | Path) -> tuple[FewShotExample, ...]:
    """ConfigError that names file and entry."""
    if not isinstance(source, Path):
        return tuple(source)
    try:
        entries = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"feedback.few_shot: {source} cannot be read ({error.strerror}); name a YAML file with a list of examples"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"feedback.few_shot: {source} is not YAML ({line})") from None
    if not isinstance(entries, list):
        raise ConfigError(
            f"feedback.few_shot: {source} must hold a list of examples, not {type(entries).__name__}"
        )
    return tuple(_example(source, number, entry) for number, entry in enumerate(entries, start=1))


def with_examples_inlined(feedback: FeedbackConfig) -> FeedbackConfig:
    """The same section with the examples of the file in it: workers on other nodes may not have the file."""
    if not isinstance(feedback.few_shot, Path):
        return feedback
    return feedback.model_copy(update={"few_shot": list(load_few_shot(feedback.few_shot))})


def _example(source: Path, number: int, entry: object) -> FewShotExample:
    try:
        return FewShotExample.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "entry"
        raise ConfigError(
            f"feedback.few_shot: {source}, example {number}: {field}: {first['msg']}"
        ) from None


def example_messages(
    examples: Sequence[FewShotExample], template: str, style: AnswerStyle
) -> list[dict[str, str]]:
    """A user and an assistant message per example, in the form in which the real question comes."""
    messages: list[dict[str, str]] = []
    for example in examples:
        phrase = example.question
        if style == "joint":
            phrase = f"{JOINT_EXAMPLE_NAME}: {phrase}"
        text = fill(
            template,
            example.conversation.strip(),
            example.response_a.strip(),
            example.response_b.strip(),
            phrase,
        )
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": _answer_text(example, style)})
    return messages


def _answer_text(example: FewShotExample, style: AnswerStyle) -> str:
    match style:
        case "letter":
            return example.answer
        case "reasoned":
            return f"{example.reasoning}\nAnswer: {example.answer}".lstrip()
        case "json":
            return json.dumps({"answer": example.answer})
        case "reasoned_json":
            return json.dumps({"reasoning": example.reasoning, "answer": example.answer})
        case "joint":
            return json.dumps({JOINT_EXAMPLE_NAME: example.answer})
