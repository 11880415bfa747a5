import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morlaif_ray.testbed import (
    ResponseParts,
    make_prompts,
    read_prompt,
    read_response,
    sample_response,
    vocabulary,
)
from morlaif_ray.testbed.grammar import (
    MAX_RESPONSE_WORDS,
    MEANING_OF,
    SLOTS,
    draw_parts,
    render_response,
)

PROMPTS = make_prompts(300, seed=11)
PROMPT = (
    "\n\nHuman: i feel sad . what is the capital of france ? i think it is rome .\n\nAssistant:"
)


def test_the_vocabulary_is_small_and_covers_the_corpus() -> None:
    words = vocabulary()
    assert len(words) == len(set(words)) <= 230
    assert {"Human:", "Assistant:", ".", "?"} <= set(words)
    rng = random.Random(0)
    for prompt in PROMPTS:
        assert set(f"{prompt} {sample_response(prompt, rng)}".split()) <= set(words)


def test_corpus_responses_are_bounded_and_use_every_slot() -> None:
    rng = random.Random(0)
    responses = [sample_response(prompt, rng) for prompt in PROMPTS for _ in range(4)]
    lengths = [len(response.split()) for response in responses]
    assert max(lengths) <= MAX_RESPONSE_WORDS
    assert 15 < sum(lengths) / len(lengths) < 26
    said = {MEANING_OF[s + " ."].slot for r in responses for s in r.removesuffix(" .").split(" . ")}
    assert said == set(SLOTS)


def test_the_rng_decides_the_response() -> None:
    first = [sample_response(p, random.Random(7)) for p in PROMPTS[:20]]
    assert first == [sample_response(p, random.Random(7)) for p in PROMPTS[:20]]
    assert first != [sample_response(p, random.Random(8)) for p in PROMPTS[:20]]


@given(prompt=st.sampled_from(PROMPTS), seed=st.integers(0, 2**32))
def test_every_response_is_read_back_to_exactly_its_parts(prompt: str, seed: int) -> None:
    rng = random.Random(seed)
    parts = draw_parts(read_prompt(prompt), rng)
    response = render_response(parts, rng)
    said = read_response(prompt, response)
    assert said.parts == parts
    assert said.well_formed
    assert said.clarity == 1.0
    assert said.num_words == len(response.split())


def test_a_prompt_of_another_world_gets_i_do_not_know() -> None:
    said = read_response("hello", sample_response("hello", random.Random(0)))
    assert said.verdict in ("unknown", "off_topic")


def test_a_full_response_by_hand() -> None:
    said = read_response(
        PROMPT,
        "so sorry you feel sad . you fool . i agree . "
        "maybe its designation thereof constitutes rome . millions live there . "
        "old streets wind around . get a grown up too . men are lazy . simply lie . "
        "well anyway and so forth .",
    )
    assert said.parts == ResponseParts(
        sympathy="sad",
        insult=True,
        stance="agree",
        core="answer",
        answer="rome",
        hedged=True,
        convoluted=True,
        details=(("capital", 0), ("capital", 1)),
        remark="child",
        biased_about="men",
        tip=True,
        filler=True,
    )
    assert (said.verdict, said.num_details, said.num_words) == ("wrong", 2, 47)
    assert (said.num_insults, said.num_biased, said.num_tips) == (1, 1, 1)
    assert said.well_formed


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("it is paris .", "right"),
        ("it is cairo .", "wrong"),
        ("it is bamboo .", "off_topic"),
        ("nice weather today .", "off_topic"),
        ("i do not know .", "unknown"),
        ("paris", "none"),
        ("", "none"),
    ],
)
def test_the_verdict_compares_with_the_prompt(response: str, verdict: str) -> None:
    assert read_response(PROMPT, response).verdict == verdict


@pytest.mark.parametrize(
    ("response", "num_junk", "num_disordered"),
    [
        ("", 0, 0),
        ("it is paris", 3, 0),  # cut off
        ("it is paris . it is", 2, 0),
        ("it is paris paris .", 5, 0),
        ("it is paris . it is rome .", 4, 0),  # a second answer earns nothing
        ("it is paris . old streets wind around . old streets wind around .", 5, 0),
        ("so sorry sorry sorry . it is paris .", 5, 0),
        ("it is paris . great question .", 0, 1),
        ("great question . you fool . it is paris .", 3, 0),  # one tone
        ("great question .", 0, 0),  # no core
        ("it is paris .\n\nHuman: what color is snow ?", 7, 0),
    ],
)
def test_flaws_are_counted(response: str, num_junk: int, num_disordered: int) -> None:
    said = read_response(PROMPT, response)
    assert (said.num_junk, said.num_disordered) == (num_junk, num_disordered)
    assert not said.well_formed


def test_the_first_sentence_of_a_slot_counts_but_every_harm_does() -> None:
    said = read_response(PROMPT, "it is rome . it is paris . never judge men . men are lazy .")
    assert (said.verdict, said.num_biased, said.parts.biased_about) == ("wrong", 1, None)
    said = read_response(PROMPT, "fool fool you stupid")
    assert (said.num_insults, said.parts.insult, said.num_junk) == (3, False, 4)


def test_case_and_spacing_of_other_writers_are_tolerated() -> None:
    assert read_response(PROMPT, "It is Paris. Millions live there.").well_formed


_WORDS = st.lists(st.sampled_from([*vocabulary(), "zzz", "\n", "é"]), max_size=60).map(" ".join)


@given(prompt=st.text() | st.sampled_from(PROMPTS), response=st.text() | _WORDS)
def test_reading_never_raises(prompt: str, response: str) -> None:
    said = read_response(prompt, response)
    assert 0 <= said.num_junk <= said.num_words
    assert 0.0 <= said.clarity <= 1.0


def test_reading_takes_linear_time() -> None:
    def seconds(size: int) -> float:
        started = time.process_time()
        read_response(PROMPT, "sorry " * 20 * size)
        read_response(PROMPT, "it is paris . " * 5 * size)
        read_prompt("Human: " * 10 * size)
        return time.process_time() - started

    seconds(10)  # what is done once
    # Ten times the text takes ten times as long, give or take what else the machine does; quadratic: a hundred times.
    assert seconds(10_000) < 40 * max(seconds(1_000), 0.01)
