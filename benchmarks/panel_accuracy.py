"""Accuracy and training time of every topology on the test-bed, trained on the same pairs with the same recipe.

    python -m benchmarks.panel --only accuracy [--seeds 3]
    python -m benchmarks.panel_accuracy [--rates 0.5 1 2] [--batch-sizes 4 8 16] [--short-memory]
                                                              (how the recipes were chosen)

A seed draws its own prompts, responses, judge's noise, heads and order of pairs; all seeds share the backbone. Every
model sees the same pairs equally often, so a model of one head and a trunk of twelve read as many tokens; the trunk's
loss is the mean over its heads. Learning rate, batch size and AdamW's betas of a topology were chosen, from the same
choices for all, on pairs of seeds that no measurement uses.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.active_selection import MAX_LENGTH, World, _train_backbone, make_world
from benchmarks.active_selection_results import t_interval
from morlaif_ray.seeding import derive_seed
from morlaif_ray.testbed import PRINCIPLES
from morlaif_ray.types import FloatArray

LONG_MEMORY, SHORT_MEMORY = (0.9, 0.999), (0.8, 0.95)
"""AdamW's betas."""


@dataclass(frozen=True)
class Recipe:
    rate: float
    batch_size: int = 4
    betas: tuple[float, float] = SHORT_MEMORY


RECIPES = {
    "separate": Recipe(1.5e-3),
    "shared_trunk": Recipe(3e-3),
    "late_branching": Recipe(3e-3),
    "adapters": Recipe(6e-3),
}
"""By topology, chosen by `python -m benchmarks.panel_accuracy` (docs/lab-log.md). Adapters learn at a higher rate."""
TOPOLOGIES = tuple(RECIPES)
TWICE = "shared_trunk_twice"
"""The shared trunk with two passes over the pairs: a sixth of the separate models' training time, not a twelfth."""
NOISE = 0.5
"""Of the judge, nats."""
TUNING_SEEDS = (1000, 1001)
"""No measurement uses their pairs."""


def measure_accuracy(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy by topology: mean over principles of the share of held-out pairs ordered as the truth orders them.

    Intervals: 95%, Student's t over seeds; with one seed bootstrap over its test pairs, each of which has a prompt of
    its own. Differences to `separate` are paired.
    """
    backbone = options.backbone or make_backbone(folder, options)
    variants = {name: (name, options) for name in TOPOLOGIES}
    twice = argparse.Namespace(**{**vars(options), "epochs": 2 * options.epochs})
    variants[TWICE] = ("shared_trunk", twice)
    hits: dict[str, list[FloatArray]] = {name: [] for name in variants}
    seconds = dict.fromkeys(variants, 0.0)
    tokens = 0
    for seed in range(options.seeds):
        train, test = make_pairs(seed, options)
        for name, (topology, settings) in variants.items():
            hit_NK, spent, read = train_and_test(
                topology, backbone, train, test, RECIPES[topology], seed, settings
            )
            if settings is options:
                tokens = read
            hits[name].append(hit_NK)
            seconds[name] += spent / options.seeds
            print(
                f"accuracy {name:18s} seed {seed} {mean_over_principles(hit_NK):.4f}   "
                f"{spent:.0f} CPU s of training",
                flush=True,
            )
    base = hits["separate"]
    return {
        "accuracy": {name: over_seeds(values) for name, values in hits.items()},
        "accuracy_difference_to_separate": {
            name: over_seeds([a - b for a, b in zip(values, base, strict=True)])
            for name, values in hits.items()
            if name != "separate"
        },
        "training_time_ratio_to_separate": {
            name: round(value / seconds["separate"], 3) for name, value in seconds.items()
        },
        "training_cpu_s": {name: round(value, 1) for name, value in seconds.items()},
        "training_tokens_per_model": tokens,
        "accuracy_by_seed": {
            name: [round(mean_over_principles(hit_NK), 4) for hit_NK in values]
            for name, values in hits.items()
        },
        "accuracy_by_principle": {
            name: dict(zip(PRINCIPLES, by_principle(values), strict=True))
            for name, values in hits.items()
        },
        "accuracy_pairs": {
            "train": options.pairs,
            "test": options.test,
            "epochs": options.epochs,
            "seeds": options.seeds,
            "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()},
        },
    }


def make_backbone(folder: Path, options: argparse.Namespace) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(_train_backbone(folder, 64, 20 if options.quick else 600))


def make_pairs(seed: int, options: argparse.Namespace) -> tuple[World, World]:
    """(training, held-out) pairs of a seed, of disjoint prompts."""
    everything = make_world(options.pairs + options.test, seed, NOISE)
    return (
        everything.rows(range(options.pairs)),
        everything.rows(range(options.pairs, options.pairs + options.test)),
    )


def over_seeds(values: Sequence[FloatArray]) -> list[float]:
    """[mean, low, high] of the seeds' means over principles."""
    if len(values) == 1:
        return interval(values[0])
    return [round(end, 4) for end in t_interval([mean_over_principles(v) for v in values])]


def by_principle(values: Sequence[FloatArray]) -> list[float]:
    """Accuracy of each principle over the pairs of all seeds."""
    means: list[float] = np.nanmean(np.concatenate(values), axis=0).round(3).tolist()
    return means


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
    recipe: Recipe,
    seed: int,
    options: argparse.Namespace,
    principles: Sequence[str] = tuple(PRINCIPLES),
) -> tuple[FloatArray, float, int]:
    """(hit per test pair and principle, CPU seconds of training, tokens that each model read).

    Ties count half; NaN without a true difference.
    """
    together = topology in ("shared_trunk", "late_branching")
    groups = [list(principles)] if together else [[name] for name in principles]
    columns, spent, tokens = [], 0.0, 0
    for heads in groups:
        started = time.process_time()
        model = fit(topology, backbone, train, heads, recipe, seed, options)
        spent += time.process_time() - started
        columns.append(model.score_heads(test.texts_a) - model.score_heads(test.texts_b))
        read = model.encode([*train.texts_a, *train.texts_b])
        tokens = options.epochs * sum(len(ids) for ids in read)
    difference_NK = np.concatenate(columns, axis=1)
    truth_NK = test.truth_NK[:, [list(PRINCIPLES).index(name) for name in principles]]
    hit_NK = np.where(difference_NK == 0, 0.5, (difference_NK > 0) == (truth_NK > 0))
    return np.where(np.abs(truth_NK) < 1e-9, np.nan, hit_NK), spent, tokens


def fit(
    topology: str,
    backbone: str,
    pairs: World,
    heads: Sequence[str],
    recipe: Recipe,
    seed: int,
    options: argparse.Namespace,
) -> Any:
    from morlaif_ray.config.inputs import LoraConfig
    from morlaif_ray.config.preferring import PreferenceConfig
    from morlaif_ray.preference import PreferenceModel
    from morlaif_ray.preference.training import TrainingData, train_preference_model

    # The paper's rank and scaling; no dropout on so few steps.
    lora = LoraConfig(dropout=0.0) if topology == "adapters" else None
    start = derive_seed(seed, "preference", *heads)
    model = PreferenceModel.from_backbone(
        backbone, heads, max_length=MAX_LENGTH, seed=start, lora=lora, topology=topology
    )
    config = PreferenceConfig(
        num_epochs=options.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.rate,
        adam_betas=recipe.betas,
        warmup_steps=10,
        max_length=MAX_LENGTH,
        lora=lora,
    )
    rows = [list(PRINCIPLES).index(name) for name in heads]
    data = TrainingData(pairs.texts_a, pairs.texts_b, pairs.judged_NK[:, rows], pairs.pair_ids)
    with tempfile.TemporaryDirectory() as folder:
        train_preference_model(
            model, data, config, seed=start, checkpoint_dir=Path(folder), checkpoint_every=1 << 30
        )
    return model


def main() -> None:
    """Held-out accuracy by topology and recipe, on pairs that no measurement uses."""
    import torch
    import transformers

    options = _parse()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    memories = (LONG_MEMORY, SHORT_MEMORY) if options.short_memory else (LONG_MEMORY,)
    with tempfile.TemporaryDirectory() as scratch:
        backbone = options.backbone or make_backbone(Path(scratch), options)
        pairs = {seed: make_pairs(seed, options) for seed in TUNING_SEEDS[: options.seeds]}
        choices = itertools.product(
            options.topologies, options.rates, options.batch_sizes, memories
        )
        for topology, factor, batch_size, betas in choices:
            recipe = Recipe(factor * RECIPES[topology].rate, batch_size, betas)
            hits, seconds = [], 0.0
            for seed, (train, held_out) in pairs.items():
                hit_NK, spent, _ = train_and_test(
                    topology, backbone, train, held_out, recipe, seed, options, options.principles
                )
                hits.append(mean_over_principles(hit_NK))
                seconds += spent / len(pairs)
            print(
                f"{topology:15s} rate {recipe.rate:.1e}  batch {batch_size:2d}  betas {betas}  "
                f"{np.mean(hits):.4f} {[round(hit, 4) for hit in hits]}   {seconds:.0f} CPU s",
                flush=True,
            )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.panel_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--short-memory", action="store_true", help=f"betas {SHORT_MEMORY}, too")
    parser.add_argument("--seeds", type=int, default=2, choices=(1, 2))
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--principles", nargs="+", default=list(PRINCIPLES), choices=PRINCIPLES)
    parser.add_argument("--backbone", help="test-bed SFT model; default: train a small one")
    parser.add_argument("--pairs", type=int, default=2400)
    parser.add_argument("--test", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="figures of no worth")
    return parser.parse_args()


if __name__ == "__main__":
    main()
