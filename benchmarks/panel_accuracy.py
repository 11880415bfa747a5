"""Accuracy and training time of every topology on the test-bed, trained on the same pairs with the same recipe."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.active_selection import MAX_LENGTH, World, _train_backbone, make_world
from morlaif_ray.testbed import PRINCIPLES
from morlaif_ray.types import FloatArray

TOPOLOGIES = ("separate", "shared_trunk", "late_branching", "adapters")
NOISE = 0.5
"""Of the judge, nats."""


def measure_accuracy(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy by topology: mean over principles of the share of held-out pairs ordered as the truth orders them.

    Intervals: 95%, bootstrap over the test pairs (each has a prompt of its own); differences to `separate` are paired.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = 20 if options.quick else 600
    backbone = options.backbone or str(_train_backbone(folder, 64, steps))
    everything = make_world(options.pairs + options.test, 0, NOISE)
    train = everything.rows(range(options.pairs))
    test = everything.rows(range(options.pairs, options.pairs + options.test))
    hits: dict[str, FloatArray] = {}
    seconds: dict[str, float] = {}
    for topology in TOPOLOGIES:
        hits[topology], seconds[topology] = train_and_test(
            topology, backbone, train, test, folder / topology, options
        )
        print(
            f"accuracy {topology:15s} {mean_over_principles(hits[topology]):.4f}   "
            f"{seconds[topology]:.0f} CPU s of training",
            flush=True,
        )
    base = hits["separate"]
    return {
        "accuracy": {name: interval(values) for name, values in hits.items()},
        "accuracy_difference_to_separate": {
            name: interval(values - base) for name, values in hits.items() if name != "separate"
        },
        "training_time_ratio_to_separate": {
            name: round(value / seconds["separate"], 3) for name, value in seconds.items()
        },
        "training_cpu_s": {name: round(value, 1) for name, value in seconds.items()},
        "accuracy_pairs": {"train": options.pairs, "test": options.test, "epochs": options.epochs},
    }


def interval(values_NK: FloatArray, num_resamples: int = 2000) -> list[float]:
    """[mean over principles of their means over pairs, low, high]."""
    rng = np.random.default_rng(0)
    means = []
    for _ in range(num_resamples):
        rows = rng.integers(0, len(values_NK), len(values_NK))
        means.append(mean_over_principles(values_NK[rows]))
    low, high = np.quantile(means, [0.025, 0.975])
    return [round(float(v), 4) for v in (mean_over_principles(values_NK), low, high)]


def mean_over_principles(values_NK: FloatArray) -> float:
    """Mean of the columns' means over their present values; a column without any is left out."""
    present_NK = ~np.isnan(values_NK)
    counts_K = present_NK.sum(axis=0)
    sums_K = np.where(present_NK, values_NK, 0.0).sum(axis=0)
    return float((sums_K[counts_K > 0] / counts_K[counts_K > 0]).mean())


def train_and_test(
    topology: str,
    backbone: str,
    train: World,
    test: World,
    folder: Path,
    options: argparse.Namespace,
) -> tuple[FloatArray, float]:
    """(hit per test pair and principle, ties half, NaN without a true difference; CPU seconds of training)."""
    together = topology in ("shared_trunk", "late_branching")
    groups = [list(PRINCIPLES)] if together else [[name] for name in PRINCIPLES]
    columns, spent = [], 0.0
    for heads in groups:
        started = time.process_time()
        model = fit(topology, backbone, train, heads, folder / heads[0], options)
        spent += time.process_time() - started
        columns.append(model.score_heads(test.texts_a) - model.score_heads(test.texts_b))
    difference_NK = np.concatenate(columns, axis=1)
    hit_NK = np.where(difference_NK == 0, 0.5, (difference_NK > 0) == (test.truth_NK > 0))
    return np.where(np.abs(test.truth_NK) < 1e-9, np.nan, hit_NK), spent


def fit(
    topology: str,
    backbone: str,
    pairs: World,
    heads: Sequence[str],
    folder: Path,
    options: argparse.Namespace,
) -> Any:
    from morlaif_ray.config.inputs import LoraConfig
    from morlaif_ray.config.learning import PreferenceConfig
    from morlaif_ray.preference import PreferenceModel
    from morlaif_ray.preference.training import TrainingData, train_preference_model

    # Adapters learn at a higher rate than whole weights; the paper's rank and scaling, no dropout on so few steps.
    lora = LoraConfig(dropout=0.0) if topology == "adapters" else None
    model = PreferenceModel.from_backbone(
        backbone, heads, max_length=MAX_LENGTH, seed=0, lora=lora, topology=topology
    )
    recipe = PreferenceConfig(
        num_epochs=options.epochs,
        batch_size=32,
        learning_rate=3e-3 if lora else 1.5e-3,
        warmup_steps=10,
        max_length=MAX_LENGTH,
        lora=lora,
    )
    rows = [list(PRINCIPLES).index(name) for name in heads]
    data = TrainingData(pairs.texts_a, pairs.texts_b, pairs.judged_NK[:, rows], pairs.pair_ids)
    train_preference_model(model, data, recipe, seed=0, checkpoint_dir=folder)
    return model
