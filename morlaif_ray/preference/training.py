"""Trains one preference model (one head or several) on labelled pairs. Resumes bit for bit from its checkpoint.

Legend: N pairs, B pairs per step, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from morlaif_ray.config.learning import PreferenceConfig
from morlaif_ray.errors import NumericalError
from morlaif_ray.preference.labels import targets
from morlaif_ray.preference.losses import bradley_terry
from morlaif_ray.preference.model import PreferenceModel
from morlaif_ray.seeding import derive_seed
from morlaif_ray.tensor_state import load_state, save_state, state_exists
from morlaif_ray.types import FloatArray

BUCKET_BATCHES = 16
"""Batches whose pairs are sorted by length together: less padding, still shuffled."""


@dataclass(frozen=True)
class TrainingData:
    """What one training sees. `log_odds_NH` is NaN where missing, infinite where a person's hard choice."""

    texts_a: Sequence[str]
    texts_b: Sequence[str]
    log_odds_NH: FloatArray
    pair_ids: Sequence[str]


@dataclass(frozen=True)
class TrainingStep:
    step: int
    loss: float
    learning_rate: float


def train_preference_model(
    model: PreferenceModel,
    data: TrainingData,
    config: PreferenceConfig,
    *,
    seed: int,
    checkpoint_dir: Path,
    checkpoint_every: int = 200,
    on_step: Callable[[int, int], None] | None = None,
) -> list[TrainingStep]:
    """Runs the recipe in place and returns one record per optimizer step.

    AdamW, linear warm-up then cosine to 0 (warm-up at most a tenth of the steps). Raises NumericalError with the pair
    ids of the batch when the loss is not finite.
    """
    labels, margins = targets(data.log_odds_NH, config.loss)
    ids_a, ids_b = model.encode(data.texts_a), model.encode(data.texts_b)
    lengths = np.array([max(len(a), len(b)) for a, b in zip(ids_a, ids_b, strict=True)])
    if config.gradient_checkpointing:
        model.model.gradient_checkpointing_enable()
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0
    )
    schedule = plan_batches(lengths, config.batch_size, config.num_epochs, seed)
    checkpoint = checkpoint_dir / "checkpoint"
    history: list[TrainingStep] = []
    if state_exists(checkpoint):
        extra = load_state(checkpoint, {"model": model.model}, optimizer)
        history = [TrainingStep(*record) for record in extra["history"]]
    for step in range(len(history), len(schedule)):
        rows = schedule[step]
        rate = config.learning_rate * rate_factor(step, len(schedule), config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _train_step(
            model, optimizer, parameters, ids_a, ids_b, labels, margins, rows, config, seed, step
        )
        if not math.isfinite(loss):
            shown = ", ".join(data.pair_ids[row][:12] for row in rows[:4])
            raise NumericalError(
                f"preference model '{model.heads[0]}': loss is {loss} at step {step} (pairs {shown}, ...); "
                f"lower preference.learning_rate or look at those pairs"
            )
        history.append(TrainingStep(step + 1, loss, rate))
        if (step + 1) % checkpoint_every == 0 and step + 1 < len(schedule):
            records = [[item.step, item.loss, item.learning_rate] for item in history]
            save_state(checkpoint, {"model": model.model}, optimizer, {"history": records})
        if on_step is not None:
            on_step(step + 1, len(schedule))
    model.model.eval()
    return history


def plan_batches(
    lengths: np.ndarray[Any, Any], batch_size: int, num_epochs: int, seed: int
) -> list[np.ndarray[Any, Any]]:
    """Row indices of every optimizer step: seeded, all rows once per epoch, similar lengths together."""
    batches: list[np.ndarray[Any, Any]] = []
    for epoch in range(num_epochs):
        rng = np.random.default_rng(derive_seed(seed, "batches", epoch))
        order = rng.permutation(len(lengths))
        span = batch_size * BUCKET_BATCHES
        epoch_batches = []
        for start in range(0, len(order), span):
            bucket = order[start : start + span]
            bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
            epoch_batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        batches += [epoch_batches[i] for i in rng.permutation(len(epoch_batches))]
    return batches


def rate_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then cosine to 0. A warm-up longer than a tenth of a short run is cut to that tenth."""
    warmup = min(warmup_steps, max(1, num_steps // 10)) if warmup_steps else 0
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _train_step(
    model: PreferenceModel,
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    ids_a: list[list[int]],
    ids_b: list[list[int]],
    labels: FloatArray,
    margins: FloatArray,
    rows: np.ndarray[Any, Any],
    config: PreferenceConfig,
    seed: int,
    step: int,
) -> float:
    model.model.train()
    torch.manual_seed(
        derive_seed(seed, "dropout", step)
    )  # dropout depends on the step alone: exact resume
    scores = model.forward([ids_a[row] for row in rows] + [ids_b[row] for row in rows])
    device = scores.device
    loss = bradley_terry(
        scores[: len(rows)],
        scores[len(rows) :],
        torch.tensor(labels[rows], dtype=torch.float32, device=device),
        torch.tensor(margins[rows], dtype=torch.float32, device=device),
        centering=config.centering,
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return float(loss.detach())
