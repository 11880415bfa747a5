"""Trains one preference model (one head or several) on labelled pairs. Resumes bit for bit from its checkpoint.

Legend: N pairs, B pairs per step, H heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.errors import NumericalError
from morlaif_ray.preference.labels import targets
from morlaif_ray.preference.model import PreferenceModel
from morlaif_ray.preference.sharding import (
    Ranks,
    current_ranks,
    load_checkpoint,
    save_checkpoint,
    shard,
)
from morlaif_ray.preference.stepping import EncodedPairs, StepOutcome, Stepper
from morlaif_ray.seeding import derive_seed
from morlaif_ray.tensor_state import state_exists
from morlaif_ray.types import FloatArray

BUCKET_BATCHES = 16
"""Batches whose pairs are sorted by length together: less padding, still shuffled."""

FAILED_BATCH = "failed_batch.json"
"""Beside the checkpoint: the pairs at which a training stopped."""


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
    checkpoint_every: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[TrainingStep]:
    """Runs the recipe in place and returns one record per optimizer step.

    In a process group of several ranks the model is sharded over them (`sharding`); all ranks make the same call.
    AdamW, linear warm-up then cosine to 0 (warm-up at most a tenth of the steps). Where memory runs out the micro-batch
    halves and `say` gets a line. Raises NumericalError when loss or gradient is not finite: the weights are not
    touched, and `failed_batch.json` in `checkpoint_dir` lists the pairs of the batch.
    """
    pairs, lengths = _encode(model, data, config.loss)
    if config.gradient_checkpointing:
        model.model.gradient_checkpointing_enable()
    ranks = current_ranks()
    shard(model, ranks)
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.adam_betas, weight_decay=0.0
    )
    stepper = Stepper(
        model,
        optimizer,
        pairs,
        config,
        seed=seed,
        say=say,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    schedule = plan_batches(lengths, config.batch_size, config.num_epochs, seed)
    checkpoint = checkpoint_dir / "checkpoint"
    every = checkpoint_every or config.checkpoint_every
    history = _resume(checkpoint, model, optimizer, stepper, ranks)
    for step in range(len(history), len(schedule)):
        rate = config.learning_rate * rate_factor(step, len(schedule), config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        outcome = stepper.step(schedule[step], step)
        if not outcome.finite:
            _stop_at(model, data, schedule[step], step, outcome, checkpoint_dir)
        history.append(TrainingStep(step + 1, outcome.loss, rate))
        if (step + 1) % every == 0 and step + 1 < len(schedule):
            records = [[item.step, item.loss, item.learning_rate] for item in history]
            state = {"history": records, "microbatch": stepper.microbatch}
            save_checkpoint(checkpoint, model, optimizer, state, ranks)
        if on_step is not None:
            on_step(step + 1, len(schedule))
    model.model.eval()
    return history


def _encode(
    model: PreferenceModel, data: TrainingData, loss: str
) -> tuple[EncodedPairs, np.ndarray[Any, Any]]:
    """Token ids with labels and margins, and the longer length of each pair."""
    labels, margins = targets(data.log_odds_NH, loss)
    pairs = EncodedPairs(model.encode(data.texts_a), model.encode(data.texts_b), labels, margins)
    lengths = np.array([max(len(a), len(b)) for a, b in zip(pairs.ids_a, pairs.ids_b, strict=True)])
    return pairs, lengths


def _resume(
    checkpoint: Path,
    model: PreferenceModel,
    optimizer: torch.optim.Optimizer,
    stepper: Stepper,
    ranks: Ranks,
) -> list[TrainingStep]:
    """Restores the last checkpoint, where there is one; the steps that lie behind it."""
    if not state_exists(checkpoint):
        return []
    extra = load_checkpoint(checkpoint, model, optimizer, ranks)
    stepper.microbatch = extra.get("microbatch", stepper.microbatch)
    return [TrainingStep(*record) for record in extra["history"]]


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


def _stop_at(
    model: PreferenceModel,
    data: TrainingData,
    rows: np.ndarray[Any, Any],
    step: int,
    outcome: StepOutcome,
    folder: Path,
) -> NoReturn:
    """NumericalError with the first pairs of the batch; the file has them all."""
    keys = [data.pair_ids[row] for row in rows]
    values = {"loss": str(outcome.loss), "grad_norm": str(outcome.grad_norm)}
    note = batch_note(folder, model.heads, step, values, keys)
    what, value = (
        ("gradient", outcome.grad_norm) if math.isfinite(outcome.loss) else ("loss", outcome.loss)
    )
    raise NumericalError(
        f"preference model '{model.heads[0]}': {what} is {value} at step {step} ({note}); lower "
        f"preference.learning_rate or look at those pairs"
    )


def batch_note(
    folder: Path, heads: Sequence[str], step: int, values: dict[str, str], keys: Sequence[str]
) -> str:
    """Writes `failed_batch.json` with all pairs of the batch and names the first few."""
    path = folder / FAILED_BATCH
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"model": list(heads), "step": step, **values, "pair_ids": list(keys)}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shown = ", ".join(key[:12] for key in keys[:4]) + (", ..." if len(keys) > 4 else "")
    return f"pairs {shown}; all {len(keys)} in {path}"
