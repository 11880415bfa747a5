"""Float32 matrix products on a CPU by oneDNN where that is faster than torch's default.

    with fast_products():      # around forward and backward passes; elsewhere torch is as it was
        loss = model(...)
        loss.backward()

torch gives float32 products on x86 to MKL, which keeps its AVX-512 code to Intel's processors; oneDNN, which torch
brings along for bfloat16, has no such preference (114 and 258 GFLOP/s of a thread on an AMD EPYC with AVX-512). Both
are sound float32: results differ in the last bits, and are the same bits again on the same kind of processor. The rule
is the processor's maker and instructions, not a measurement, so that all processes of a run, and the run that resumes
it, compute alike.

Legend: N rows, K inputs, M outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

CPU_INFO = Path("/proc/cpuinfo")
LEAST_OPERATIONS = 1 << 20
"""Multiply-adds below which the call costs more than the product."""


@functools.cache
def is_faster() -> bool:
    """Whether this processor is one of those for which MKL does not use all instructions."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8")
    except OSError:
        return False
    return "AuthenticAMD" in text and "avx512f" in text and has_operator()


def has_operator() -> bool:
    """Whether this torch has the operator, which its compiler emits and no one documents (2.11 and 2.13 have it)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside, linear layers of float32 on a CPU are computed by oneDNN where it is faster; everything else as ever."""
    if not is_faster():
        yield
        return
    with _FastProducts():
        yield


class _FastProducts(TorchFunctionMode):
    """Catches what linear layers call: `torch.nn.Linear` and GPT-2's transposed `Conv1D`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if kwargs:
            return func(*args, **kwargs)
        if func is torch.nn.functional.linear:
            x, weight_MK, bias_M = (*args, None)[:3]
            if _suits(x, weight_MK, bias_M, weight_MK.shape[0]):
                x_NK = x.reshape(-1, x.shape[-1])
                made: Tensor = _Linear.apply(x_NK, weight_MK, bias_M)  # type: ignore[no-untyped-call]
                return made.view(*x.shape[:-1], -1)
        elif func is torch.addmm:
            bias_M, x_NK, weight_KM = args
            if bias_M.dim() == 1 and _suits(x_NK, weight_KM, bias_M, weight_KM.shape[-1]):
                return _TransposedLinear.apply(x_NK, weight_KM, bias_M)  # type: ignore[no-untyped-call]
        return func(*args)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None, num_outputs: int) -> bool:
    return (
        all(each.dtype is torch.float32 for each in (x, weight) if each is not None)
        and x.device.type == "cpu"
        and weight.dim() == 2
        and x.dim() >= 2
        and x.numel() * num_outputs >= LEAST_OPERATIONS
        and all(_is_plain(each) for each in (x, weight, bias) if each is not None)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _is_plain(tensor: Tensor) -> bool:
    """Neither a slice on one of several processes, nor a tensor of a transformation."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _product(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    if not (weight_MK.is_contiguous() or weight_MK.t().is_contiguous()):
        # A slice of a larger matrix goes to oneDNN's plain loops, two thousand times slower.
        weight_MK = weight_MK.contiguous()
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x_NK, weight_MK, bias_M, "none", [], "")
    return made


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NK, weight_MK)
        return _product(x_NK, weight_MK, bias_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NM: Tensor) -> tuple[Tensor | None, ...]:
        x_NK, weight_MK = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _product(gradient_NM, weight_MK.t()) if wants_x else None,
            _product(gradient_NM.t(), x_NK.t()) if wants_weight else None,
            gradient_NM.sum(dim=0) if wants_bias else None,
        )


class _TransposedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_KM: Tensor, bias_M: Tensor) -> Tensor:
        ctx.save_for_backward(x_NK, weight_KM)
        return _product(x_NK, weight_KM.t(), bias_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NM: Tensor) -> tuple[Tensor | None, ...]:
        x_NK, weight_KM = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _product(gradient_NM, weight_KM) if wants_x else None,
            _product(x_NK.t(), gradient_NM.t()) if wants_weight else None,
            gradient_NM.sum(dim=0) if wants_bias else None,
        )
