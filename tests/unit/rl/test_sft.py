"""What the SFT trainer is given: tokens, and which of them carry a loss."""

from __future__ import annotations

from typing import Any

import pytest

from morlaif_ray.rl.sft import IGNORED, encode_dialogues
from morlaif_ray.types import Dialogue

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

PROMPT = "\n\nHuman: red green\n\nAssistant:"  # Human: red green Assistant:
HUMAN, ASSISTANT, EOS = "Human:", "Assistant:", "<eos>"


def encoded(tokenizer: Any, response: str, max_length: int) -> tuple[list[str], list[str | None]]:
    """Tokens and labels as words; None where no loss is."""
    made = encode_dialogues(tokenizer, [Dialogue("id", PROMPT, response)], max_length)[0]
    words = tokenizer.convert_ids_to_tokens(made["input_ids"])
    labels = [None if x == IGNORED else tokenizer.convert_ids_to_tokens(x) for x in made["labels"]]
    return words, labels


def test_prompt_tokens_carry_no_loss_and_eos_is_learned(tokenizer: Any) -> None:
    words, labels = encoded(tokenizer, " blue sun", 20)
    assert words == [HUMAN, "red", "green", ASSISTANT, "blue", "sun", EOS]
    assert labels == [None, None, None, None, "blue", "sun", EOS]


def test_truncation_drops_the_oldest_prompt_tokens(tokenizer: Any) -> None:
    words, labels = encoded(tokenizer, " blue sun", 5)
    assert words == ["green", ASSISTANT, "blue", "sun", EOS]
    assert labels == [None, None, "blue", "sun", EOS]


def test_a_response_that_is_too_long_keeps_its_beginning_and_one_prompt_token(
    tokenizer: Any,
) -> None:
    words, labels = encoded(tokenizer, " blue sun moon star", 3)
    assert words == [ASSISTANT, "blue", "sun"]
    assert labels == [None, "blue", "sun"]


@pytest.mark.parametrize("max_length", [2, 4, 20])
@pytest.mark.parametrize("response", ["", " ", " blue"])
def test_there_is_always_something_to_learn(tokenizer: Any, response: str, max_length: int) -> None:
    words, labels = encoded(tokenizer, response, max_length)
    assert len(words) == len(labels) <= max_length
    assert labels[0] is None
    assert labels[-1] == (EOS if response.strip() == "" or max_length > 2 else "blue")


def test_a_response_without_its_leading_space_is_the_same(tokenizer: Any) -> None:
    assert encoded(tokenizer, "blue", 20) == encoded(tokenizer, " blue", 20)
