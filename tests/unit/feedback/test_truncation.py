"""What is cut from a pair that is too long, with lengths counted by hand (4 characters a token)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.errors import ConfigError
from morlaif_ray.feedback.client import AttemptError, Question
from morlaif_ray.feedback.prompting import PHRASE_TOKENS, Prompter, count_truncated, prompter_for
from morlaif_ray.feedback.truncation import Fitted, count_by_chars, fit, load_counter
from morlaif_ray.types import ResponsePair

pytestmark = pytest.mark.unit
TEMPLATE = "{conversation}{response_a}{response_b}{question}"
TURNS = "Human: 1111\n\nAssistant: 2222\n\nHuman: 3333"  # 11, 15 and 11 characters, 41 in all: 11 tokens


def test_a_pair_that_fits_is_left_alone() -> None:
    # 11 + 2 + 2 = 15 tokens.
    assert fit(TURNS, "a" * 8, "b" * 8, 15, count_by_chars) == Fitted(
        TURNS, "a" * 8, "b" * 8, False
    )


def test_the_oldest_turns_go_first_and_no_more_than_needed() -> None:
    # Without the first turn 28 characters = 7 tokens; 7 + 2 + 2 = 11.
    for room, kept in (
        (14, "Assistant: 2222\n\nHuman: 3333"),
        (11, "Assistant: 2222\n\nHuman: 3333"),
        (10, "Human: 3333"),
    ):
        assert fit(TURNS, "a" * 8, "b" * 8, room, count_by_chars) == Fitted(
            kept, "a" * 8, "b" * 8, True
        )


def test_then_both_responses_are_cut_to_one_length_from_the_end() -> None:
    # "Human: 3333" is 3 tokens; of 23 tokens 20 are left: 10 for each, 40 characters.
    first, second = "a" * 200 + "z", "b" * 100
    assert fit(TURNS, first, second, 23, count_by_chars) == Fitted(
        "Human: 3333", "a" * 40, "b" * 40, True
    )


def test_a_short_response_stays_whole_beside_a_long_one() -> None:
    # 20 tokens for both: 2 for the short one, 18 for the long one.
    assert fit("Human: 3333", "a" * 8, "b" * 400, 23, count_by_chars) == Fitted(
        "Human: 3333", "a" * 8, "b" * 72, True
    )


def test_the_cut_is_the_same_in_both_orders() -> None:
    ab = fit(TURNS, "a" * 50, "b" * 90, 25, count_by_chars)
    ba = fit(TURNS, "b" * 90, "a" * 50, 25, count_by_chars)
    assert ab is not None
    assert ba is not None
    assert (ab.first, ab.second) == (ba.second, ba.first)


def test_a_last_message_that_is_too_long_by_itself_is_not_asked() -> None:
    assert fit("Human: " + "x" * 400, "a" * 50, "b" * 50, 60, count_by_chars) is None
    prompter = Prompter(TEMPLATE, max_prompt_tokens=PHRASE_TOKENS + 60)
    with pytest.raises(AttemptError, match="last message alone is too long"):
        prompter.user_message(question("Human: " + "x" * 400, "a" * 50, "b" * 50))


def question(prompt: str, first: str, second: str, phrase: str = "Q?") -> Question:
    return Question(prompt, first, second, "detail", phrase, "ab", b"k" * 16)


def test_all_phrases_see_the_pair_cut_alike() -> None:
    prompter = Prompter(TEMPLATE, max_prompt_tokens=PHRASE_TOKENS + 40)
    asked = [question(TURNS, "a" * 300, "b" * 300, phrase) for phrase in ("Q?", "Longer, " * 20)]
    shown = [prompter.user_message(entry).removesuffix(entry.phrase) for entry in asked]
    assert shown[0] == shown[1]
    assert prompter.truncates(asked[0])


def test_truncated_pairs_are_counted_once_each() -> None:
    pairs = [
        ResponsePair(f"p{i}", "q", TURNS, "a" * length, "b", "test", float("nan"))
        for i, length in enumerate((10, 5000, 20, 9000))
    ]
    assert count_truncated(FeedbackConfig(), pairs) == 0
    assert count_truncated(FeedbackConfig(max_prompt_tokens=1000), pairs) == 2


def test_examples_that_fill_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_prompt_tokens is 90 but template and few-shot"):
        prompter_for(FeedbackConfig(max_prompt_tokens=90))


def test_a_tokenizer_file_counts_instead_of_characters(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    vocab = {"[UNK]": 0, "a": 1}
    path.write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": None,
                "decoder": None,
                "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
            }
        )
    )
    assert load_counter(path)("a a word") == load_counter(tmp_path)("a a word") == 3
    with pytest.raises(ConfigError, match=r"feedback.tokenizer: .*missing.json is not a file"):
        load_counter(tmp_path / "missing.json")
