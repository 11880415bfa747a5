"""Products by oneDNN are torch's within rounding, forward and backward, and only where the rule says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from morlaif_ray import cpu_products
from morlaif_ray.cpu_products import fast_products
from morlaif_ray.rl.token_head import HeadSettings, head_logprobs
from tests.unit.feedback.tiny_judges import tiny_model

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not cpu_products.has_operator(), reason="this torch has no oneDNN operator"),
]


class Counter:
    """How often oneDNN was called."""

    def __init__(self) -> None:
        self.count = 0
        self._product = cpu_products._product

    def __call__(self, *arguments: Any) -> torch.Tensor:
        self.count += 1
        return self._product(*arguments)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """On whatever processor the tests run, and for the smallest product."""
    counter = Counter()
    monkeypatch.setattr(cpu_products, "_product", counter)
    monkeypatch.setattr(cpu_products, "is_faster", lambda: True)
    monkeypatch.setattr(cpu_products, "LEAST_OPERATIONS", 1)
    return counter


def with_gradients(call: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    made = call(*leaves)
    made.square().sum().backward()
    return [made.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_layer_and_its_gradients(
    products: Counter, shape: tuple[int, ...], with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (11, 7), (11,)))
    tensors = (x, weight, bias) if with_bias else (x, weight)
    expected = with_gradients(linear, *tensors)
    with fast_products():
        found = with_gradients(linear, *tensors)
    assert products.count == 3
    assert len(found) == len(tensors) + 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_transposed_layer_and_its_gradients(products: Counter) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in ((11,), (5, 7), (7, 11))]
    expected = with_gradients(torch.addmm, *tensors)
    with fast_products():
        found = with_gradients(torch.addmm, *tensors)
    assert products.count == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert found[3].is_contiguous()  # as the optimizer wants it


def test_slices_of_a_larger_matrix_are_copied_first(
    products: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dense:
        """Refuses the weights for which oneDNN has plain loops only."""

        @staticmethod
        def _linear_pointwise(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
            assert weight.is_contiguous() or weight.t().is_contiguous()
            return product(x, weight, *rest)

    product = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(cpu_products.torch.ops, "mkldnn", Dense)

    def of_slices(x: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        return linear(x[:, ::2], whole[:, 3:14].T)

    tensors = torch.randn(5, 14), torch.randn(7, 20)
    expected = with_gradients(of_slices, *tensors)
    with fast_products():
        found = with_gradients(of_slices, *tensors)
    assert products.count == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_only_gradients_that_are_wanted_are_computed(products: Counter) -> None:
    with fast_products():
        linear(torch.randn(4, 3), torch.randn(5, 3).requires_grad_()).sum().backward()
    assert products.count == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_a_model_with_its_head_and_all_gradients(
    products: Counter, kind: str, chunk_tokens: int | None
) -> None:
    model = tiny_model(kind, vocabulary=50, scale=1.0)
    tokens_BL = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))

    def gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        states_ND = model.base_model(input_ids=tokens_BL).last_hidden_state.flatten(0, 1)
        how = HeadSettings(temperature=0.8, chunk_tokens=chunk_tokens)
        weight = model.get_output_embeddings().weight
        logprobs_N, _ = head_logprobs(states_ND, weight, None, tokens_BL.flatten(), how)
        logprobs_N.mean().backward()
        return logprobs_N, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected_N, expected = gradients()
    with fast_products():
        found_N, found = gradients()
    assert products.count > 20
    torch.testing.assert_close(found_N, expected_N, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_what_does_not_suit_is_left_to_torch(
    products: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(6, 3), torch.randn(5, 3)
    with fast_products():
        linear(x.double(), weight.double())
        linear(x.bfloat16(), weight.bfloat16())
        linear(x[0], weight)
        torch.addmm(torch.randn(6, 5), x, weight.t())  # a matrix is no bias
        torch.addmm(torch.randn(5), x, weight.t(), alpha=2.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, weight).dtype is torch.bfloat16
        monkeypatch.setattr(cpu_products, "LEAST_OPERATIONS", 6 * 3 * 5 + 1)
        linear(x, weight)
    linear(x, weight)
    monkeypatch.setattr(cpu_products, "is_faster", lambda: False)
    with fast_products():
        linear(x, weight)
    assert products.count == 0


@pytest.mark.parametrize(
    ("text", "faster"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512bw\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f\n", False),
        (None, False),
    ],
)
def test_the_processor_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, faster: bool
) -> None:
    monkeypatch.setattr(cpu_products, "CPU_INFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    assert cpu_products.is_faster.__wrapped__() == faster
