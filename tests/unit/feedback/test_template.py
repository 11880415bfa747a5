"""The prompt: what must stand in it, in which order, and that texts cannot break it."""

from __future__ import annotations

import pytest

from morlaif_ray.errors import ConfigError
from morlaif_ray.feedback.client import Question
from morlaif_ray.feedback.template import DEFAULT_TEMPLATE, check_template, render

pytestmark = pytest.mark.unit


def question(phrase: str, first: str = " one", second: str = " two") -> Question:
    return Question("\n\nHuman: hi\n\nAssistant:", first, second, "detail", phrase, "ab", b"k" * 16)


def test_the_shipped_template_is_valid() -> None:
    check_template(DEFAULT_TEMPLATE)


@pytest.mark.parametrize("name", ["conversation", "first", "second", "question"])
def test_a_missing_placeholder_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"lacks \{{{name}\}}"):
        check_template(DEFAULT_TEMPLATE.replace("{" + name + "}", ""))


def test_a_repeated_placeholder_is_named() -> None:
    with pytest.raises(ConfigError, match=r"repeats \{first\}"):
        check_template("{first}" + DEFAULT_TEMPLATE)


def test_the_question_must_come_last_so_that_the_prefix_is_shared() -> None:
    with pytest.raises(ConfigError, match=r"put \{question\} last"):
        check_template("{question} {conversation} {first} {second}")


def test_two_principles_share_everything_up_to_the_phrase() -> None:
    left = render(DEFAULT_TEMPLATE, question("Which is kinder?"))
    right = render(DEFAULT_TEMPLATE, question("Which is shorter?"))
    assert left.split("Which is kinder?")[0] == right.split("Which is shorter?")[0]
    assert left.index("\none\n") < left.index("\ntwo\n") < left.index("Which is kinder?")


def test_braces_in_a_response_are_text() -> None:
    assert "{question} {first} {0}" in render(
        DEFAULT_TEMPLATE, question("Q?", first="{question} {first} {0}")
    )


@pytest.mark.parametrize("name", ["conversation", "response_a", "response_b", "question"])
def test_a_template_of_ones_own_is_told_which_placeholder_it_lacks(name: str) -> None:
    template = "{conversation} {response_a} {response_b} {question}"
    with pytest.raises(ConfigError, match=rf"feedback.template\) lacks \{{{name}\}}"):
        check_template(template.replace("{" + name + "}", ""))


def test_an_unknown_placeholder_is_named_and_json_braces_are_text() -> None:
    template = "{conversation} {response_a} {response_b} {question}"
    with pytest.raises(ConfigError, match=r"unknown placeholder \{principle\}; it knows"):
        check_template("{principle} " + template)
    check_template(template + ' like {"answer": "A"} or {}')


def test_a_reasoning_judge_must_be_told_how_to_end() -> None:
    template = "{conversation} {response_a} {response_b} {question}"
    with pytest.raises(ConfigError, match="does not tell the judge to end with 'Answer: A'"):
        check_template(template, "reasoned")
    check_template(template + " End with Answer: A or Answer: B.", "reasoned")


def test_both_names_of_a_response_render_alike() -> None:
    texts = (
        "{conversation}|{first}|{second}|{question}",
        "{conversation}|{response_a}|{response_b}|{question}",
    )
    assert [render(text, question("Q?")) for text in texts] == ["Human: hi|one|two|Q?"] * 2
