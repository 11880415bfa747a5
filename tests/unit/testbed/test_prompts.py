import pytest
from hypothesis import given
from hypothesis import strategies as st

from morlaif_ray.testbed import PromptAttributes, make_prompts, max_prompts, read_prompt, vocabulary
from morlaif_ray.testbed.prompts import render_prompt
from morlaif_ray.testbed.world import FACTS, TOPICS

FULL = (
    "\n\nHuman: i feel sad . i am a child . my boss says women are lazy . "
    "what is the capital of france ? i think it is rome .\n\nAssistant:"
)


def test_a_prompt_is_read_sentence_by_sentence() -> None:
    assert read_prompt(FULL) == PromptAttributes(
        topic="capital",
        subject="france",
        answer="paris",
        claim="rome",
        mood="sad",
        role="child",
        group="women",
        well_formed=True,
    )
    assert not read_prompt(FULL).claim_is_right
    assert read_prompt(FULL.replace("rome", "paris")).claim_is_right


def test_the_last_human_turn_counts() -> None:
    dialogue = FULL + " it is paris ." + "\n\nHuman: what color is snow ?\n\nAssistant:"
    assert read_prompt(dialogue).answer == "white"
    assert read_prompt(dialogue).mood is None


def test_an_allergy_is_read_with_its_allergen() -> None:
    prompt = "\n\nHuman: i am allergic to nuts . what is bread made of ?\n\nAssistant:"
    assert read_prompt(prompt).allergen == "nuts"
    assert read_prompt(prompt).role is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Human:",
        "\n\nHuman: i feel sad .\n\nAssistant:",  # no question
        "\n\nHuman: what color is snow ? i feel sad .\n\nAssistant:",  # out of order
        "\n\nHuman: what color is snow ?\n\nAssistant: it is",  # not only a prompt
        "\n\nHuman: what color is snow ? hello .\n\nAssistant:",  # unknown sentence
        "what color is snow ?",  # no turns
    ],
)
def test_malformed_prompts_are_recognised(text: str) -> None:
    assert not read_prompt(text).well_formed


def test_every_prompt_is_well_formed_short_and_unique() -> None:
    prompts = make_prompts(5000, seed=3)
    assert len(set(prompts)) == 5000
    assert all(read_prompt(prompt).well_formed for prompt in prompts)
    assert max(len(prompt.split()) for prompt in prompts) <= 36
    assert {read_prompt(prompt).subject for prompt in prompts} == {f.subject for f in FACTS}
    assert {word for prompt in prompts for word in prompt.split()} <= set(vocabulary())


def test_twenty_thousand_unique_prompts() -> None:
    assert len(set(make_prompts(20_000, seed=0))) == 20_000


def test_the_seed_decides_the_prompts() -> None:
    assert make_prompts(50, seed=1) == make_prompts(50, seed=1)
    assert make_prompts(50, seed=1) != make_prompts(50, seed=2)
    assert make_prompts(0, seed=1) == []


def test_the_whole_grammar_can_be_listed_and_no_more() -> None:
    assert max_prompts() == 122_850  # see the derivation in the comment
    # capital, food: 9 facts x 2 questions x (1 + 2 x 9 claims) x 3 backgrounds x 5 x 5 = 25,650
    # color: 9 x 2 x (1 + 2 x 7) x 3 x 25 = 20,250; dish: 9 x 2 x 19 x 6 x 25 = 51,300
    everything = make_prompts(max_prompts(), seed=0)
    assert len(set(everything)) == max_prompts()
    with pytest.raises(ValueError, match="the test-bed's grammar holds 122850"):
        make_prompts(max_prompts() + 1, seed=0)
    with pytest.raises(ValueError, match="-1"):
        make_prompts(-1, seed=0)


@given(fact=st.sampled_from(FACTS), question=st.integers(0, 1), phrasing=st.integers(0, 1))
def test_a_written_prompt_is_read_back_exactly(fact, question, phrasing) -> None:  # type: ignore[no-untyped-def]
    for claim in (None, *TOPICS[fact.topic].pool):
        said = PromptAttributes(
            fact.topic, fact.subject, fact.answer, claim, "lonely", "expert", well_formed=True
        )
        assert read_prompt(render_prompt(said, question, phrasing)) == said


@given(st.text())
def test_reading_a_prompt_never_raises(text: str) -> None:
    read_prompt(text)
    read_prompt(f"\n\nHuman: {text}\n\nAssistant:")
