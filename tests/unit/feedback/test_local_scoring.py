"""Sharing a prefix changes the work, never the answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from morlaif_ray.feedback.local_scoring import (
    PACKED_FAMILIES,
    PrefixScorer,
    common_prefix_length,
    cut_groups,
)
from tests.unit.feedback.tiny_judges import FAMILIES, tiny_model

pytestmark = pytest.mark.unit
A, B = 7, 11
"""Token ids that stand for the two letters here."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts_of_groups() -> list[list[list[int]]]:
    """Four groups with 5, 3, 1 and 4 prompts behind prefixes of 40, 23, 37 and 61 tokens."""
    draw = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=draw).tolist()

    return [
        [prefix + tokens(count) for count in counts]
        for prefix, counts in (
            (tokens(40), (9, 1, 4, 12, 9)),
            (tokens(23), (2, 3, 1)),
            (tokens(37), (5,)),
            (tokens(61), (11, 7, 7, 2)),
        )
    ]


def log_odds(logprobs_RV: torch.Tensor) -> list[float]:
    return (logprobs_RV[:, A] - logprobs_RV[:, B]).tolist()


def asked_alone(model: object, prompts: list[list[int]]) -> list[float]:
    """The plain way: every prompt by itself, whole, no cache, no padding."""
    with torch.inference_mode():
        rows = [model(torch.tensor([ids])).logits[0, -1] for ids in prompts]  # type: ignore[operator]
    return log_odds(torch.log_softmax(torch.stack(rows), dim=1))


def test_the_common_prefix_stops_before_the_first_difference() -> None:
    assert common_prefix_length([[5, 6, 7, 8], [5, 6, 9, 9], [5, 6, 7]]) == 2


def test_the_common_prefix_leaves_every_prompt_a_token_to_ask_about() -> None:
    assert common_prefix_length([[5, 6, 7], [5, 6, 7, 8]]) == 2
    assert common_prefix_length([[5]]) == 0


def test_groups_are_cut_and_numbered_in_the_order_they_came() -> None:
    first, second = cut_groups([[[1, 2, 3], [1, 2, 4, 5]], [[8, 9]]])
    assert (first.numbers, first.prefix, first.suffixes) == ((0, 1), [1, 2], ([3], [4, 5]))
    assert (second.numbers, second.prefix, second.suffixes) == ((2,), [8], ([9],))


def test_every_family_that_may_be_packed_is_tested_here() -> None:
    assert set(FAMILIES) >= PACKED_FAMILIES


@pytest.mark.parametrize("may_pack", [True, False], ids=["packed", "expanded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_odds_are_those_of_independent_prompts(family: str, may_pack: bool) -> None:
    model = tiny_model(family)
    groups = prompts_of_groups()
    alone = asked_alone(model, [ids for group in groups for ids in group])
    for max_rows in (
        100,
        4,
        1,
    ):  # all groups in one pass; groups cut in parts; one prompt at a time
        scorer = PrefixScorer(model, pad_id=0, max_rows=max_rows, may_pack=may_pack)
        assert scorer.score(groups, log_odds) == pytest.approx(alone, abs=1e-4)
    assert max(alone) - min(alone) > 0.1  # a scorer that mixes prompts up would be seen


def test_a_model_with_another_kind_of_memory_is_asked_with_whole_prompts() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)).eval()
    groups = prompts_of_groups()
    alone = asked_alone(model, [ids for group in groups for ids in group])
    scorer = PrefixScorer(model, pad_id=0, max_rows=4)
    assert scorer.score(groups, log_odds) == pytest.approx(alone, abs=1e-4)


def test_twelve_prompts_with_one_prefix_cost_one_prefix() -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, options: seen.append(options["input_ids"].numel()), with_kwargs=True
    )
    prefix = list(range(3, 83))
    group = [[*prefix, 90 + number % 5, 3 + number] for number in range(12)]
    PrefixScorer(model, pad_id=0, max_rows=12).score([group], log_odds)
    # 80 shared tokens once and 2 of its own per prompt; twelve whole prompts would be 984.
    assert seen == [80, 24]
