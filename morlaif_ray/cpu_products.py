"""Float32 matrix products on a CPU by oneDNN where that is faster than torch's default.

    with fast_products():      # around forward and backward passes; elsewhere torch is as it was
        loss = model(...)
        loss.backward()

torch gives float32 products on x86 to MKL, which keeps its AVX-512 code to Intel's processors; oneDNN, which torch
brings along for bfloat16, has no such preference (114 and 258 GFLOP/s of a thread on an AMD EPYC with AVX-512). Both
are sound float32: results differ in the last bits, and are the same bits again on the same kind of processor. The rule
is the processor's maker and instructions, not a measurement, so that all processes of a run, and the run that resumes
it, compute alike.

oneDNN generates machine code for every shape that it meets: some milliseconds and megabytes each, while the number of
tokens differs from pass to pass. So rows are rounded up to one of eight sizes per octave, zeros in between, and
`ONEDNN_PRIMITIVE_CACHE_CAPACITY` shapes are kept, unless the environment says otherwise (torch: 1024, which is
gigabytes).

Legend: N rows, R rows rounded up, K inputs, M outputs.
"""

from __future__ import annotations

import functools
import os
import threading
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
LEAST_ROWS = 16
"""Rows are rounded up to at least a multiple of this."""
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # read at the first product


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
    outer, _here.is_fast = _is_fast(), True
    try:
        with _FastProducts():
            yield
    finally:
        _here.is_fast = outer


def preferred_rows(num_rows: int) -> int:
    """As many rows, or a few more: with so many a product inside `fast_products` need not copy its inputs."""
    return _rounded(num_rows) if _is_fast() else num_rows


_here = threading.local()


def _is_fast() -> bool:
    """Whether this thread is inside a `fast_products` that does something."""
    return getattr(_here, "is_fast", False)


class _FastProducts(TorchFunctionMode):
    """Catches what linear layers call (`torch.nn.Linear`, GPT-2's transposed `Conv1D`), and `mm` without gradients."""

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
                return _Linear.apply(x_NK, weight_KM.t(), bias_M)  # type: ignore[no-untyped-call]
        elif func is torch.mm and not torch.is_grad_enabled():
            x_NK, weight_KM = args
            if _suits(x_NK, weight_KM, None, weight_KM.shape[-1]):
                return _product(x_NK, weight_KM.t())
        return func(*args)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None, num_outputs: int) -> bool:
    return (
        x.dtype is weight.dtype is torch.float32
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


def _rounded(num_rows: int) -> int:
    """The least of eight sizes per octave that holds so many rows."""
    unit = max(LEAST_ROWS, 1 << max(0, num_rows.bit_length() - 4))
    return -(-num_rows // unit) * unit


def _padded(x_NK: Tensor) -> Tensor:
    """[R, K], dense; zeros below."""
    num_rows, width = x_NK.shape
    rounded = _rounded(num_rows)
    if rounded == num_rows:
        return x_NK
    made_RK = x_NK.new_empty(rounded, width)
    made_RK[:num_rows] = x_NK
    made_RK[num_rows:] = 0.0
    return made_RK


def _product(x_RK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    if not (weight_MK.is_contiguous() or weight_MK.t().is_contiguous()):
        # A slice of a larger matrix goes to oneDNN's plain loops, two thousand times slower.
        weight_MK = weight_MK.contiguous()
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x_RK, weight_MK, bias_M, "none", [], "")
    return made


def _first_rows(made_RM: Tensor, num_rows: int) -> Tensor:
    """Without the others; in place, so that the result is no view, which callers could not change."""
    return made_RM.resize_(num_rows, made_RM.shape[1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
        x_RK = _padded(x_NK)
        ctx.save_for_backward(x_RK, weight_MK)
        return _first_rows(_product(x_RK, weight_MK, bias_M), len(x_NK))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NM: Tensor) -> tuple[Tensor | None, ...]:
        x_RK, weight_MK = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        gradient_RM, num_rows = _padded(gradient_NM), len(gradient_NM)
        d_weight: Tensor | None = None
        if wants_weight and weight_MK.is_contiguous():
            d_weight = _product(gradient_RM.t(), x_RK.t())
        elif wants_weight:  # stored as [K, M]: its gradient is to lie like it
            d_weight = _product(x_RK.t(), gradient_RM.t()).t()
        return (
            _first_rows(_product(gradient_RM, weight_MK.t()), num_rows) if wants_x else None,
            d_weight,
            gradient_NM.sum(dim=0) if wants_bias else None,
        )
