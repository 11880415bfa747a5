"""The prompt put to the judge: conversation and responses first, the phrase last.

All questions about one pair in one order share everything up to the phrase, so a provider's or vLLM's prefix cache
serves K principles with about one prefill.

Placeholders: {conversation}, {response_a}, {response_b}, {question}. {first} and {second} are older names of the two
responses. "A" is the response shown first, which is the pair's response_b in order "ba".
"""

from __future__ import annotations

import re
from typing import Literal

from morlaif_ray.errors import ConfigError
from morlaif_ray.feedback.client import Question

AnswerStyle = Literal["letter", "reasoned", "json", "reasoned_json", "joint"]
"""How the judge is asked to answer: one token; reasoning, then a line "Answer: A"; a JSON object."""

PLACEHOLDERS = ("conversation", "response_a", "response_b", "question")
_OLDER_NAMES = {"response_a": "first", "response_b": "second"}

_BODY = """\
Below are a conversation between a person and an AI assistant, and two candidate responses to the last message.

<conversation>
{conversation}
</conversation>

<response_A>
{first}
</response_A>

<response_B>
{second}
</response_B>

{question}"""

DEFAULT_TEMPLATE = f"{_BODY} Answer with a single letter, A or B."

DEFAULT_TEMPLATES: dict[AnswerStyle, str] = {
    "letter": DEFAULT_TEMPLATE,
    "reasoned": f"{_BODY} Reason step by step. Then end with a line that reads 'Answer: A' or 'Answer: B'.",
    "json": f'{_BODY} Answer with a JSON object whose field "answer" is "A" or "B".',
    "reasoned_json": (
        f'{_BODY} Answer with a JSON object: first "reasoning", step by step, then "answer", which is "A" or "B".'
    ),
    "joint": _BODY,
}

_BRACED = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_FILLED = re.compile(r"\{(conversation|first|second|response_a|response_b|question)\}")


def check_template(template: str, style: AnswerStyle = "letter") -> None:
    """ConfigError that names the placeholder which is missing, repeated, unknown, or in the wrong place."""
    found = _BRACED.findall(template)
    names = _names_used(found)
    wanted = ", ".join("{" + name + "}" for name in names)
    for name in names:
        if found.count(name) != 1:
            problem = "lacks" if name not in found else "repeats"
            raise ConfigError(
                f"judge template (feedback.template) {problem} {{{name}}}; it needs {wanted}, each once"
            )
    for name in found:
        if name not in names:
            raise ConfigError(
                f"judge template (feedback.template) has an unknown placeholder {{{name}}}; it knows {wanted}"
            )
    if found[-1] != "question":
        raise ConfigError(
            f"judge template (feedback.template) has {{{found[-1]}}} after {{question}}; put {{question}} last, so "
            f"that all principles share one cached prefix"
        )
    if style == "reasoned" and "Answer:" not in template:
        raise ConfigError(
            "judge template (feedback.template) does not tell the judge to end with 'Answer: A' or 'Answer: B', by "
            "which the answer is found after its reasoning; write that after {question}"
        )


def _names_used(found: list[str]) -> tuple[str, ...]:
    """The four names that this template goes by: each response by its older name where that stands in it."""
    older = any(name in found for name in _OLDER_NAMES.values())
    return tuple(_OLDER_NAMES.get(name, name) if older else name for name in PLACEHOLDERS)


def conversation_of(prompt: str) -> str:
    """The dialogue as shown: without the turn that the responses begin, and without outer blanks."""
    return prompt.removesuffix("Assistant:").strip()


def render(template: str, question: Question) -> str:
    """The user message. Braces inside conversation or responses are left as they are."""
    return fill(
        template,
        conversation_of(question.prompt),
        question.first.strip(),
        question.second.strip(),
        question.phrase,
    )


def fill(template: str, conversation: str, first: str, second: str, phrase: str) -> str:
    """Puts the texts in their places in one pass, so that no text is searched for placeholders."""
    values = {
        "conversation": conversation,
        "first": first,
        "second": second,
        "response_a": first,
        "response_b": second,
        "question": phrase,
    }
    return _FILLED.sub(lambda match: values[match.group(1)], template)
