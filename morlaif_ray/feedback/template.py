"""The prompt put to the judge: conversation and responses first, the phrase last.

All questions about one pair in one order share everything up to the phrase, so a provider's or vLLM's prefix cache
serves K principles with about one prefill.
"""

from __future__ import annotations

import re

from morlaif_ray.errors import ConfigError
from morlaif_ray.feedback.client import Question

PLACEHOLDERS = ("conversation", "first", "second", "question")

DEFAULT_TEMPLATE = """\
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

{question} Answer with a single letter, A or B."""

_PLACEHOLDER = re.compile(r"\{(" + "|".join(PLACEHOLDERS) + r")\}")


def check_template(template: str) -> None:
    """ConfigError unless each placeholder stands in it exactly once and {question} is the last of them."""
    found = _PLACEHOLDER.findall(template)
    for name in PLACEHOLDERS:
        if found.count(name) != 1:
            problem = "lacks" if name not in found else "repeats"
            raise ConfigError(
                f"judge template {problem} {{{name}}}; it needs "
                f"{', '.join('{' + entry + '}' for entry in PLACEHOLDERS)}, each once"
            )
    if found[-1] != "question":
        raise ConfigError(
            f"judge template has {{{found[-1]}}} after {{question}}; put {{question}} last, so that all "
            f"principles share one cached prefix"
        )


def render(template: str, question: Question) -> str:
    """The user message. Braces inside conversation or responses are left as they are."""
    values = {
        "conversation": question.prompt.removesuffix("Assistant:").strip(),
        "first": question.first.strip(),
        "second": question.second.strip(),
        "question": question.phrase,
    }
    return _PLACEHOLDER.sub(lambda match: values[match.group(1)], template)
