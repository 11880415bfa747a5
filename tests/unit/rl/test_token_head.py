"""The output layer's own gradient against autograd through a plain log-softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from morlaif_ray.rl.token_head import HeadSettings, head_logprobs

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

N, D, V = 11, 6, 17


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, requires_grad=True)
    bias = torch.randn(V, generator=generator, requires_grad=True)
    tokens = torch.randint(0, V, (N,), generator=generator)
    return states, weight, bias, tokens, torch.randn(N, generator=generator)


def plain(states: Tensor, weight: Tensor, bias: Tensor, how: HeadSettings) -> Tensor:
    logits = states @ weight.T + bias
    if how.softcap is not None:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    return torch.log_softmax(logits / how.temperature, dim=-1)


SETTINGS = {
    "kept": HeadSettings(),
    "tempered": HeadSettings(temperature=0.7),
    "one_by_one": HeadSettings(temperature=1.3, chunk_tokens=1),
    "uneven_chunks": HeadSettings(chunk_tokens=4),
    "one_chunk": HeadSettings(chunk_tokens=100),
    "capped": HeadSettings(temperature=0.7, softcap=0.5),
    "capped_chunks": HeadSettings(temperature=0.7, softcap=0.5, chunk_tokens=3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_are_those_of_the_log_softmax(name: str) -> None:
    how = SETTINGS[name]
    states, weight, bias, tokens, slope = inputs()
    expected = plain(states, weight, bias, how).gather(1, tokens.unsqueeze(1)).squeeze(1)
    wanted = torch.autograd.grad((expected * slope).sum(), (states, weight, bias))
    made, _ = head_logprobs(states, weight, bias, tokens, how)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad((made * slope).sum(), (states, weight, bias))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_entropies_are_those_of_the_distribution_and_carry_no_gradient(name: str) -> None:
    how = SETTINGS[name]
    states, weight, bias, tokens, _ = inputs()
    made, entropies = head_logprobs(states, weight, bias, tokens, how, with_entropies=True)
    table = plain(states, weight, bias, how)
    torch.testing.assert_close(entropies, -(table.exp() * table).sum(1), rtol=1e-5, atol=1e-5)
    assert made.requires_grad
    assert not entropies.requires_grad
    assert not head_logprobs(states, weight, bias, tokens, how)[1].any()


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    states, weight, bias, tokens, slope = inputs()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    head_logprobs(states, weight, bias, tokens, HeadSettings())[0].backward(slope)
    assert weight.grad is None
    assert states.grad is not None


def test_no_token_is_a_batch_too() -> None:
    states, weight, bias, tokens, _ = inputs()
    made, entropies = head_logprobs(states[:0], weight, bias, tokens[:0], HeadSettings())
    assert made.shape == entropies.shape == (0,)
    made.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_half_precision_is_summed_in_full() -> None:
    states, weight, bias, tokens, slope = inputs()
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (states, weight, bias)]
    made, _ = head_logprobs(half[0], half[1], half[2], tokens, HeadSettings(chunk_tokens=4))
    assert made.dtype == torch.float32
    made.backward(slope)
    assert half[1].grad is not None
    assert half[1].grad.dtype == torch.bfloat16
    logits = (half[0].detach() @ half[1].detach().T + half[2].detach()).float()
    exact = torch.log_softmax(logits, -1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(made.detach(), exact, rtol=0, atol=0.05)
