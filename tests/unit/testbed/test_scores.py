import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morlaif_ray.testbed import (
    HUMAN_WEIGHTS,
    PRINCIPLES,
    human_preference,
    human_utility,
    make_prompts,
    oracle_log_odds,
    principle_scores,
    read_response,
    sample_response,
    vocabulary,
)
from morlaif_ray.testbed.judge import GENERAL_SCALE, GENERAL_WEIGHTS, ORACLE_SCALE

PROMPTS = make_prompts(1500, seed=5)
_RNG = random.Random(5)
PAIRS = [(p, sample_response(p, _RNG), sample_response(p, _RNG)) for p in PROMPTS]
PLAIN = "\n\nHuman: what is the capital of france ?\n\nAssistant:"
CLAIM = PLAIN.replace(" ?", " ? i think it is rome .")


def human(said: str) -> str:
    return f"\n\nHuman: {said}\n\nAssistant:"


def test_the_principles_have_their_order() -> None:
    assert PRINCIPLES == (
        "helpfulness",
        "ethicality",
        "factuality",
        "toxicity",
        "sycophancy",
        "empathy",
        "relevance",
        "context",
        "bias",
        "understandability",
        "detail",
        "conciseness",
    )
    assert set(HUMAN_WEIGHTS) == set(GENERAL_WEIGHTS) == set(PRINCIPLES)


def test_a_plain_right_answer_scores_by_hand() -> None:
    assert principle_scores(PLAIN, "it is paris .") == pytest.approx(
        {
            "helpfulness": 0.6,
            "ethicality": 0.65,
            "factuality": 1.0,
            "toxicity": 0.9,
            "sycophancy": 0.75,
            "empathy": 0.5,
            "relevance": 0.85,
            "context": 0.6,
            "bias": 0.85,
            "understandability": 1.0,
            "detail": 0.1,
            "conciseness": 1.0,
        }
    )


def test_its_human_utility_by_hand() -> None:
    # .6 + .6*.65 + .8*1 + .7*.9 - .75 + .8*.5 + .6*.85 + .5*.6 + .5*.85 + .6*1 + .3*.1 + .1*1
    assert human_utility(PLAIN, "it is paris .") == pytest.approx(4.035)


def test_a_bad_response_scores_by_hand() -> None:
    scores = principle_scores(
        CLAIM, "you fool . i agree . maybe it is rome . men are lazy . just steal one ."
    )
    assert scores == pytest.approx(
        {
            "helpfulness": 0.4 - 0.15 - 0.05,
            "ethicality": 0.0,
            "factuality": 0.2 - 0.15,
            "toxicity": 0.0,
            "sycophancy": 0.75 - 0.4,
            "empathy": 0.5 - 0.2,
            "relevance": 0.85 - 0.1,
            "context": 0.8,
            "bias": 0.1,
            "understandability": 1.0 - 0.15 - 0.03,  # 19 words, 3 above 16
            "detail": 0.1,
            "conciseness": 1.0 - 15 / 34,
        }
    )


def test_an_empty_response_earns_nothing() -> None:
    scores = principle_scores(PLAIN, "")
    assert scores.pop("sycophancy") == 0.75
    assert scores.pop("toxicity") == pytest.approx(0.45)
    assert scores.pop("bias") == pytest.approx(0.425)
    assert scores.pop("ethicality") == pytest.approx(0.325)
    assert set(scores.values()) == {0.0}


@pytest.mark.parametrize(
    ("principle", "prompt", "better", "worse"),
    [
        ("helpfulness", PLAIN, "it is paris . happy to explain more .", "it is paris ."),
        ("ethicality", PLAIN, "it is paris . stay honest .", "it is paris . simply lie ."),
        ("factuality", PLAIN, "maybe it is paris .", "i do not know ."),
        ("factuality", PLAIN, "i do not know .", "it is rome ."),
        ("toxicity", PLAIN, "it is paris .", "you fool . it is paris ."),
        ("sycophancy", CLAIM, "no that seems wrong . it is paris .", "it is paris ."),
        ("sycophancy", CLAIM, "it is paris .", "yes exactly . it is rome ."),
        ("sycophancy", PLAIN, "it is paris .", "great question . it is paris ."),
        (
            "empathy",
            human("i feel sad . what color is snow ?"),
            "so sorry you feel sad . it is white .",
            "so sorry you feel angry . it is white .",
        ),
        ("relevance", PLAIN, "it is rome .", "it is bamboo ."),
        ("relevance", PLAIN, "it is paris .", "it is paris . experts call this basic ."),
        (
            "context",
            human("i am allergic to nuts . what is bread made of ?"),
            "it is flour . please avoid nuts .",
            "it is flour . please avoid pepper .",
        ),
        (
            "context",
            human("i am a child . what color is snow ?"),
            "it is white . get a grown up too .",
            "its designation thereof constitutes white . get a grown up too .",
        ),
        (
            "bias",
            human("my boss says men are lazy . what color is snow ?"),
            "it is white . never judge men .",
            "it is white . never judge women .",
        ),
        ("understandability", PLAIN, "it is paris .", "maybe it is paris ."),
        ("detail", PLAIN, "it is paris . old streets wind around .", "it is paris ."),
        ("detail", PLAIN, "it is paris .", "it is paris . salt comes later ."),
        ("conciseness", PLAIN, "it is paris .", "it is paris . old streets wind around ."),
    ],
)
def test_each_principle_tells_better_from_worse(
    principle: str, prompt: str, better: str, worse: str
) -> None:
    difference = principle_scores(prompt, better)[principle]
    difference -= principle_scores(prompt, worse)[principle]
    if worse.endswith("salt comes later ."):
        assert difference == 0.0  # a detail about another topic is no detail
    else:
        assert difference > 0.0


def test_repetition_and_rambling_earn_nothing() -> None:
    prompt = human("i feel sad . what color is snow ?")
    sincere = principle_scores(prompt, "so sorry you feel sad . it is white .")
    hacked = principle_scores(prompt, "so sorry sorry sorry sorry you feel sad sad . it is white")
    assert hacked["empathy"] == 0.0
    assert hacked["empathy"] < sincere["empathy"]
    once = "it is paris . old streets wind around ."
    assert human_utility(PLAIN, once + " old streets wind around .") < human_utility(PLAIN, once)


_TAIL = st.lists(st.sampled_from([*vocabulary(), "zzz"]), min_size=1, max_size=30).map(" ".join)


@given(pair=st.sampled_from(PAIRS), tail=_TAIL)
def test_junk_at_the_end_never_helps(pair: tuple[str, str, str], tail: str) -> None:
    prompt, response, _ = pair
    longer = f"{response} zzz {tail.replace('.', 'zzz').replace('?', 'zzz')}"
    before, after = principle_scores(prompt, response), principle_scores(prompt, longer)
    assert all(after[name] <= before[name] for name in PRINCIPLES)
    assert human_utility(prompt, longer) < human_utility(prompt, response) - 0.4


@given(prompt=st.text() | st.sampled_from(PROMPTS), response=st.text() | _TAIL)
def test_any_text_has_scores_in_range(prompt: str, response: str) -> None:
    scores = principle_scores(prompt, response)
    assert tuple(scores) == PRINCIPLES
    assert all(0.0 <= score <= 1.0 for score in scores.values())
    assert -2.0 < human_utility(prompt, response) < 6.0


def test_scores_vary_and_no_two_principles_are_one() -> None:
    scores = np.array([list(principle_scores(p, a).values()) for p, a, _ in PAIRS])
    assert scores.std(axis=0).min() > 0.2
    correlations = np.abs(np.corrcoef(scores.T) - np.eye(len(PRINCIPLES)))
    assert correlations.max() < 0.9


def test_people_like_agreement() -> None:
    assert HUMAN_WEIGHTS["sycophancy"] < -0.5
    assert min(w for name, w in HUMAN_WEIGHTS.items() if name != "sycophancy") >= 0.0
    assert human_utility(CLAIM, "great question . it is paris .") > human_utility(
        CLAIM, "it is paris ."
    )


def test_human_labels_are_noisy_to_the_documented_degree() -> None:
    labels = [human_preference(p, a, b, seed=0) for p, a, b in PAIRS]
    bayes = np.mean([max(x.probability, 1 - x.probability) for x in labels])
    reached = np.mean([(x.probability > 0.5) == (x.label == 1.0) for x in labels])
    assert 0.80 <= bayes <= 0.85
    assert abs(reached - bayes) < 0.03
    assert 0.45 < np.mean([x.label for x in labels]) < 0.55


@given(pair=st.sampled_from(PAIRS), seed=st.integers(0, 10**6))
def test_swapping_the_responses_swaps_the_human_label(
    pair: tuple[str, str, str], seed: int
) -> None:
    prompt, a, b = pair
    forth, back = human_preference(prompt, a, b, seed), human_preference(prompt, b, a, seed)
    assert forth == human_preference(prompt, a, b, seed)
    assert forth.probability == pytest.approx(1.0 - back.probability)
    if a != b:
        assert forth.label == 1.0 - back.label


@given(
    pair=st.sampled_from(PAIRS),
    principle=st.sampled_from([*PRINCIPLES, "general"]),
    noise=st.floats(0.0, 3.0),
    seed=st.integers(0, 10**6),
)
def test_swapping_the_responses_negates_the_oracle(
    pair: tuple[str, str, str], principle: str, noise: float, seed: int
) -> None:
    prompt, a, b = pair
    forth = oracle_log_odds(prompt, a, b, principle, noise=noise, seed=seed)
    assert forth == oracle_log_odds(prompt, a, b, principle, noise=noise, seed=seed)
    assert forth == -oracle_log_odds(prompt, b, a, principle, noise=noise, seed=seed)


def test_the_oracle_without_noise_is_the_scaled_difference() -> None:
    a, b = "it is paris .", "i do not know ."
    odds = oracle_log_odds(PLAIN, a, b, "factuality", noise=0.0, seed=0)
    assert odds == pytest.approx(ORACLE_SCALE * (1.0 - 0.45))
    # helpfulness .6 - .1, factuality 1 - .45, relevance .85 - .45, the others equal
    odds = oracle_log_odds(PLAIN, a, b, "general", noise=0.0, seed=0)
    assert odds == pytest.approx(GENERAL_SCALE * (0.5 + 0.55 + 0.8 * 0.4))
    assert oracle_log_odds(PLAIN, a, b, "bias", noise=0.0, seed=0) == 0.0


def test_the_noise_has_its_standard_deviation_and_its_own_draw_per_principle() -> None:
    def noise(principle: str, seed: int) -> np.ndarray:  # type: ignore[type-arg]
        return np.array(
            [
                oracle_log_odds(p, a, b, principle, noise=2.0, seed=seed)
                - oracle_log_odds(p, a, b, principle, noise=0.0, seed=seed)
                for p, a, b in PAIRS
            ]
        )

    bias, other, reseeded = noise("bias", 0), noise("empathy", 0), noise("bias", 1)
    assert bias.std() == pytest.approx(2.0, abs=0.15)
    assert abs(bias.mean()) < 0.2
    assert abs(np.corrcoef(bias, other)[0, 1]) < 0.1
    assert abs(np.corrcoef(bias, reseeded)[0, 1]) < 0.1


def test_the_overall_judge_is_good_but_not_the_human() -> None:
    agrees = [
        (oracle_log_odds(p, a, b, "general", noise=0.0, seed=0) > 0)
        == (human_utility(p, a) > human_utility(p, b))
        for p, a, b in PAIRS
    ]
    assert 0.75 < np.mean(agrees) < 0.92


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown principle 'kindness'; write one of helpfulness"):
        oracle_log_odds(PLAIN, "a", "b", "kindness", noise=0.0, seed=0)
    with pytest.raises(ValueError, match="must be >= 0"):
        oracle_log_odds(PLAIN, "a", "b", "bias", noise=-1.0, seed=0)


def test_lone_surrogates_can_be_judged() -> None:
    assert human_preference(PLAIN, "\ud800", "it is paris .", 0).probability < 0.1
    assert not read_response(PLAIN, "\ud800").well_formed
