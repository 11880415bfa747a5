"""One optimizer step over a batch of pairs, in micro-batches that fit into memory.

The loss of a batch is a sum over its pairs with denominators of the whole batch, so gradients accumulated over
micro-batches (or over ranks) are those of one big forward up to float rounding. Dropout draws other masks when the
micro-batch changes. Legend: B pairs per step, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.cpu_products import fast_products
from morlaif_ray.errors import ResourceError
from morlaif_ray.preference.losses import bradley_terry
from morlaif_ray.preference.model import PreferenceModel
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import FloatArray, IntArray

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class EncodedPairs:
    """Token ids of both texts of N pairs with their labels and margins [N, H]; NaN labels are masked."""

    ids_a: Sequence[Sequence[int]]
    ids_b: Sequence[Sequence[int]]
    labels_NH: FloatArray
    margins_NH: FloatArray


@dataclass(frozen=True)
class StepOutcome:
    """What one step did. Where `finite` is False no weight was changed."""

    loss: float
    grad_norm: float
    """Before clipping."""

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))


class Stepper:
    """Forward, backward and update of one batch; halves its micro-batch when memory runs out."""

    def __init__(
        self,
        model: PreferenceModel,
        optimizer: torch.optim.Optimizer,
        pairs: EncodedPairs,
        config: PreferenceConfig,
        *,
        seed: int,
        say: Callable[[str], None],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._pairs = pairs
        self._config = config
        self._seed = seed
        self._say = say
        self._rank = rank
        self._world_size = world_size
        self.microbatch = config.microbatch_size or config.batch_size
        """Pairs per forward and rank."""

    def step(self, rows: IntArray, number: int) -> StepOutcome:
        """Takes step `number` on these pairs. ResourceError where a single pair does not fit into memory."""
        while True:
            try:
                loss = self._gradients(rows, number)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
            # Outside of the handler: its traceback holds the activations that are to be freed.
            self._optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = _clip(trained, self._world_size > 1)
        outcome = StepOutcome(loss, norm)
        if outcome.finite:
            self._optimizer.step()
        return outcome

    @fast_products()
    def _gradients(self, rows: IntArray, number: int) -> float:
        """Accumulates the gradients of the batch and returns its loss."""
        self._model.model.train()
        names: tuple[str | int, ...] = ("dropout", number)
        if self._rank:
            names = (*names, self._rank)
        torch.manual_seed(
            derive_seed(self._seed, *names)
        )  # dropout depends on the step: exact resume
        self._optimizer.zero_grad(set_to_none=True)
        counts_H = (~np.isnan(self._pairs.labels_NH[rows])).sum(axis=0)
        own = _share_of(rows, self._rank, self._world_size)
        total: Tensor | None = None
        for start in range(0, len(own), self.microbatch):
            part = own[start : start + self.microbatch]
            whole = self._world_size == 1 and len(part) == len(rows)
            loss = self._loss(part, None if whole else counts_H)
            # Gradients of ranks are averaged: times their number makes that a sum.
            (loss * self._world_size if self._world_size > 1 else loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        if self._world_size > 1:
            torch.distributed.all_reduce(total)
        return float(total)

    def _loss(self, part: IntArray, counts_H: IntArray | None) -> Tensor:
        """Loss of some pairs of the batch; row -1 stands for no pair and adds nothing."""
        pairs, model = self._pairs, self._model
        device = next(model.model.parameters()).device
        low = autocast_dtype(self._config.precision, device.type)
        with torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None):
            scores = model.forward([ids[row] for ids in (pairs.ids_a, pairs.ids_b) for row in part])
        labels = np.where((part < 0)[:, None], np.nan, pairs.labels_NH[part])
        return bradley_terry(
            scores[: len(part)],
            scores[len(part) :],
            torch.tensor(labels, dtype=torch.float32, device=device),
            torch.tensor(pairs.margins_NH[part], dtype=torch.float32, device=device),
            centering=self._config.centering,
            counts_H=None if counts_H is None else torch.tensor(counts_H, device=device),
        )

    def _halve(self, error: BaseException) -> None:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        if self._world_size > 1:
            raise ResourceError(
                f"preference model '{self._model.heads[0]}': out of memory on one of {self._world_size} workers "
                f"({cause}); set preference.microbatch_size below {self.microbatch}"
            ) from None
        if self.microbatch == 1:
            raise ResourceError(
                f"preference model '{self._model.heads[0]}': a single pair does not fit into memory ({cause}); "
                f"set preference.gradient_checkpointing, lower preference.max_length, or train adapters "
                f"(preference.lora)"
            ) from None
        before, self.microbatch = self.microbatch, (self.microbatch + 1) // 2
        self._say(
            f"preference model '{self._model.heads[0]}': out of memory with {before} pairs per forward; going on "
            f"with {self.microbatch} and accumulated gradients (set preference.microbatch_size to begin there)"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's and the CPU allocator's ways to say it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "not enough memory" in text
    )


def autocast_dtype(precision: Any, device: str) -> torch.dtype | None:
    """What matrix products are computed in beside float32 weights; None: float32."""
    if precision == "bfloat16" or (precision == "auto" and device == "cuda"):
        return torch.bfloat16
    return None


def _share_of(rows: IntArray, rank: int, world_size: int) -> IntArray:
    """Every `world_size`-th row; shorter shares end with -1, because all ranks must run equally many forwards."""
    if world_size == 1:
        return rows
    missing = -len(rows) % world_size
    padded: IntArray = np.concatenate([rows, np.full(missing, -1, dtype=rows.dtype)])
    return padded[rank::world_size]


def _clip(parameters: Sequence[torch.nn.Parameter], sharded: bool) -> float:
    """Scales gradients down to MAX_GRAD_NORM and returns the norm that they had."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    if sharded:
        from torch.distributed.tensor import DTensor

        assert isinstance(norm, DTensor)  # spread over the ranks
        norm = norm.full_tensor()
    return float(norm)
