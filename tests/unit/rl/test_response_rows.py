"""The last block at response positions alone is the whole block's result and gradient, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
)

from morlaif_ray.rl.policy_model import TokenBatch, _let_pack, packs, response_states
from morlaif_ray.rl.response_rows import states_at

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 30}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
TRUNKS: dict[str, Any] = {
    "gpt2": lambda: GPT2Model(
        GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=30, resid_pdrop=0, attn_pdrop=0)
    ),
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL, **HEADS)),
    "gemma": lambda: GemmaModel(GemmaConfig(**SMALL, **HEADS)),
}


@pytest.mark.parametrize("kind", TRUNKS)
def test_states_and_gradients_are_those_of_the_whole_block(kind: str) -> None:
    torch.manual_seed(0)
    trunk = TRUNKS[kind]().eval()
    names = list(trunk.state_dict())
    embedded = torch.randn(3, 7, 16)
    index = torch.tensor([2, 3, 6, 9, 20])
    pull = torch.randn(5, 16)
    found = []
    for made in (
        lambda: states_at(trunk, embedded, index),
        lambda: trunk(inputs_embeds=embedded).last_hidden_state.flatten(0, 1)[index],
    ):
        trunk.zero_grad()
        states = made()
        (states * pull).sum().backward()
        gradients = [p.grad.clone() for p in trunk.parameters() if p.grad is not None]
        found.append((states.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert len(found[0][1]) == len(found[1][1]) > 10
    for ours, whole in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)
    assert list(trunk.state_dict()) == names


def test_the_feed_forward_of_the_last_block_sees_the_rows_alone() -> None:
    trunk = TRUNKS["gpt2"]().eval()
    seen = []
    for block in trunk.h:
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1]))
    states_at(trunk, torch.randn(3, 7, 16), torch.tensor([1, 8]))
    assert seen == [(3, 7), (2,)]


def test_a_trunk_that_is_not_known_is_computed_whole() -> None:
    trunk = TRUNKS["gpt2"]().eval()

    class Other(type(trunk.h[0])):  # type: ignore[misc]
        pass

    trunk.h[-1].__class__ = Other
    embedded, index = torch.randn(2, 4, 16), torch.tensor([0, 5])
    expected = trunk(inputs_embeds=embedded).last_hidden_state.flatten(0, 1)[index]
    torch.testing.assert_close(states_at(trunk, embedded, index), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", TRUNKS)
def test_rows_without_padding_give_the_states_and_gradients_of_padded_ones(kind: str) -> None:
    torch.manual_seed(0)
    trunk = TRUNKS[kind]().eval()
    batch = TokenBatch.from_lengths(
        torch.randint(0, 30, (3, 9)), torch.tensor([2, 5, 1]), torch.tensor([4, 1, 8])
    )
    pull, found, seen = torch.randn(13, 16), [], []
    trunk.register_forward_hook(
        lambda _, __, kwargs, ___: seen.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    for _ in range(2):
        trunk.zero_grad()
        states = response_states(trunk, batch)
        (states * pull).sum().backward()
        found.append([states.detach(), *(p.grad.clone() for p in trunk.parameters())])
        _let_pack(trunk)
    assert seen == [(3, 9, 16), (1, 18, 16)]  # 6 + 6 + 9 tokens, three of which end a row
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)


def test_attention_in_a_window_stays_padded() -> None:
    settings = {**SMALL, **HEADS, "max_position_embeddings": 64}
    for window, expected in ((8, False), (64, True)):
        trunk = MistralModel(MistralConfig(**settings, sliding_window=window))
        _let_pack(trunk)
        assert packs(trunk) == expected
