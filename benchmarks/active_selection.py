"""What a judged pair buys: PM accuracy over the number of judged pairs, random or by ensemble disagreement.

    python -m benchmarks.active_selection [--seeds 3] [--sizes 100 200 400 800] [--run-dir RUN] [--document FILE.md]

Test-bed pairs from the corpus (no generation), the oracle's log-odds with noise as labels (both orders asked: its
position bias cancels exactly), one shared-trunk PM with 12 heads per point, trained anew on the chosen pairs. Accuracy:
mean over principles of the share of held-out pairs whose score difference has the sign of the oracle's *noise-free*
log-odds. Both strategies start from the same seed set, so their first points are one and the same. Intervals: 95%,
Student's t over seeds (each seed draws its own prompts, responses, noise, heads and order).

CPU minutes; one torch thread per process. `--keep DIR` keeps the backbone and every finished seed: the same command
goes on after an interruption (give another folder for other sizes). `--run-dir` leaves `learning_curve.csv` where the
report of a run shows it. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.active_selection_results import (
    ACTIVE,
    RANDOM,
    Settings,
    curve_rows,
    summary,
    write_document,
)
from morlaif_ray.artifacts import read_json, write_csv, write_json
from morlaif_ray.feedback.selection import (
    bootstrap_members,
    choose_pairs,
    disagreement,
    member_columns,
    member_labels,
    member_predictions,
    random_order,
)
from morlaif_ray.seeding import derive_seed, stable_hash
from morlaif_ray.testbed import PRINCIPLES, make_prompts, oracle_log_odds, sample_response
from morlaif_ray.types import Dialogue, FloatArray

MAX_LENGTH = 96


@dataclass(frozen=True)
class World:
    """The pairs of one seed: N texts a and b, the judge's log-odds and the truth [N, K]."""

    pair_ids: list[str]
    texts_a: list[str]
    texts_b: list[str]
    judged_NK: FloatArray
    truth_NK: FloatArray

    def rows(self, index: Sequence[int]) -> World:
        pick = list(index)
        return World(
            [self.pair_ids[i] for i in pick],
            [self.texts_a[i] for i in pick],
            [self.texts_b[i] for i in pick],
            self.judged_NK[pick],
            self.truth_NK[pick],
        )


def main() -> None:
    options = _parse()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        backbone = options.backbone or _train_backbone(folder, options.width, options.sft_steps)
        settings = Settings(
            backbone=str(backbone),
            sizes=tuple(sorted(options.sizes)),
            pool=options.pool,
            test=options.test,
            ensemble=options.ensemble,
            min_steps=options.min_steps,
            learning_rate=options.learning_rate,
            noise=options.noise,
        )
        print(f"backbone ready after {time.monotonic() - started:.0f} s", flush=True)
        results = _run_seeds(settings, folder, options.seeds, options.processes)
    rows = curve_rows([seed["accuracy"] for seed in results], settings.sizes)
    figures = summary(rows, results, settings) | {"wall_s": round(time.monotonic() - started, 1)}
    if options.run_dir is not None:
        write_csv(options.run_dir / "learning_curve.csv", rows)
    if options.document is not None:
        write_document(options.document, rows, results, settings, _describe(options))
    for row in rows:
        print(
            f"{row['strategy']:22s} {row['num_pairs']:5d} pairs   accuracy {row['accuracy']:.4f} "
            f"[{row['low']:.4f}, {row['high']:.4f}]   difference {row['difference']:+.4f}"
        )
    print(json.dumps(figures))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 200, 400, 800])
    parser.add_argument("--pool", type=int, default=2400, help="pairs to choose from")
    parser.add_argument("--test", type=int, default=1500, help="held-out pairs")
    parser.add_argument("--ensemble", type=int, default=4, help="members")
    parser.add_argument("--min-steps", type=int, default=100, help="fewest optimizer steps per PM")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--noise", type=float, default=0.5, help="the judge's, nats")
    parser.add_argument("--backbone", help="an SFT model's folder; default: train a small one")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--sft-steps", type=int, default=600)
    parser.add_argument("--keep", type=Path, help="keep backbone and finished seeds here")
    parser.add_argument("--processes", type=int, default=1, help="seeds at the same time")
    parser.add_argument("--run-dir", type=Path, help="leave learning_curve.csv in this run folder")
    parser.add_argument("--document", type=Path, help="write table and figure to this .md file")
    return parser.parse_args()


def _describe(options: argparse.Namespace) -> str:
    if options.backbone:
        return f"backbone `{options.backbone}`"
    return f"a {options.width}-wide, 3-layer GPT-2 fine-tuned for {options.sft_steps} steps"


# ---------------------------------------------------------------- backbone and pairs


def _train_backbone(scratch: Path, width: int, num_steps: int) -> Path:
    """A small GPT-2 fine-tuned on corpus dialogues that no pair is made of; one that is there is taken."""
    if (scratch / "model").is_dir():
        return scratch / "model"
    import torch

    from morlaif_ray.backbone import build_word_tokenizer, dialogue_text, save_pretrained
    from morlaif_ray.config.inputs import ScratchModel, SftConfig
    from morlaif_ray.rl.sft import build_sft_trainer

    torch.set_num_threads(1)
    prompts = make_prompts(4000, derive_seed("backbone"))
    dialogues = [
        Dialogue(stable_hash(prompt)[:24], prompt, f" {response}")
        for prompt in prompts
        for response in [sample_response(prompt, random.Random(derive_seed("sft", prompt))).strip()]
    ]
    tokenizer = build_word_tokenizer(
        [dialogue_text(d.prompt, d.response) for d in dialogues],
        vocabulary_size=2000,
        max_length=MAX_LENGTH,
    )
    trainer = build_sft_trainer(
        SftConfig(
            num_steps=num_steps,
            batch_size=48,
            learning_rate=4e-3,
            warmup_steps=40,
            checkpoint_every=10 * num_steps,
        ),
        ScratchModel(width=width, num_layers=3, num_heads=4, max_length=MAX_LENGTH),
        tokenizer,
        dialogues,
        [],
        output_dir=scratch / "trainer",
        seed=0,
        num_workers=1,
        callbacks=[],
    )
    trainer.train()
    save_pretrained(trainer.model, tokenizer, scratch / "model")
    return scratch / "model"


def make_world(num: int, seed: int, noise: float) -> World:
    """`num` pairs of different responses, with the judge's and the true log-odds."""
    from morlaif_ray.backbone.dialogue import dialogue_text

    pairs: list[tuple[str, str, str]] = []
    for prompt in make_prompts(num + num // 5, derive_seed("active_selection", seed)):
        first, second = (
            sample_response(prompt, random.Random(derive_seed(seed, "pair", prompt, slot)))
            for slot in (0, 1)
        )
        if first != second and len(pairs) < num:
            pairs.append((prompt, first, second))
    judged, truth = (
        np.array(
            [
                [oracle_log_odds(*pair, name, noise=level, seed=seed) for name in PRINCIPLES]
                for pair in pairs
            ]
        )
        for level in (noise, 0.0)
    )
    assert len(pairs) == num, f"only {len(pairs)} of {num} pairs have different responses"
    return World(
        [stable_hash(*pair)[:24] for pair in pairs],
        [dialogue_text(prompt, first) for prompt, first, _ in pairs],
        [dialogue_text(prompt, second) for prompt, _, second in pairs],
        judged,
        truth,
    )


# ---------------------------------------------------------------- one seed


def run_seed(settings: Settings, seed: int) -> dict[str, Any]:
    """Accuracy per strategy, size and principle, and how the choices differ from the pool."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    everything = make_world(settings.pool + settings.test, seed, settings.noise)
    pool = everything.rows(range(settings.pool))
    test = everything.rows(range(settings.pool, settings.pool + settings.test))
    place = {pair_id: row for row, pair_id in enumerate(pool.pair_ids)}
    order = random_order(pool.pair_ids, seed)
    chosen = {RANDOM: order[: settings.sizes[0]], ACTIVE: order[: settings.sizes[0]]}
    accuracy: dict[str, list[list[float]]] = {RANDOM: [], ACTIVE: []}
    ratios: list[float] = []
    for number, size in enumerate(settings.sizes):
        if number:
            chosen[RANDOM] = order[:size]
            more, ratio = _choose(settings, pool, place, chosen[ACTIVE], size, seed)
            chosen[ACTIVE] = [*chosen[ACTIVE], *more]
            ratios.append(ratio)
        for strategy in (RANDOM, ACTIVE):
            if number == 0 and strategy == ACTIVE:
                accuracy[ACTIVE].append(accuracy[RANDOM][0])  # the same pairs: the same model
                continue
            rows = sorted(place[pair_id] for pair_id in chosen[strategy])
            accuracy[strategy].append(_accuracy(settings, pool.rows(rows), test, seed))
            mean = float(np.mean(accuracy[strategy][-1]))
            print(f"seed {seed}  {strategy:22s} {size:5d} pairs  accuracy {mean:.4f}", flush=True)
    return {
        "accuracy": accuracy,
        "variance_ratio": ratios,
        "mean_abs_log_odds": {
            name: float(np.abs(pool.judged_NK[[place[i] for i in ids]]).mean())
            for name, ids in chosen.items()
        },
    }


def _choose(
    settings: Settings,
    pool: World,
    place: dict[str, int],
    judged: Sequence[str],
    size: int,
    seed: int,
) -> tuple[list[str], float]:
    """The next pairs, and their mean disagreement over the pool's."""
    rows = sorted(place[pair_id] for pair_id in judged)
    seen = pool.rows(rows)
    inside = bootstrap_members(seen.pair_ids, settings.ensemble, seed)
    columns = member_columns(PRINCIPLES, settings.ensemble)
    model = _fit(settings, seen, columns, member_labels(seen.judged_NK, inside), seed)
    predictions = member_predictions(
        model.score_heads(pool.texts_a), model.score_heads(pool.texts_b), settings.ensemble
    )
    more = choose_pairs(predictions, pool.pair_ids, judged, size - len(judged), seed)
    variance = disagreement(predictions)
    return more, float(variance[[place[i] for i in more]].mean() / variance.mean())


def _accuracy(settings: Settings, chosen: World, test: World, seed: int) -> list[float]:
    """Accuracy per principle of a PM trained on the chosen pairs; pairs without a true difference are left out."""
    model = _fit(settings, chosen, list(PRINCIPLES), chosen.judged_NK, seed)
    difference_NK = model.score_heads(test.texts_a) - model.score_heads(test.texts_b)
    hit_NK = np.where(difference_NK == 0, 0.5, (difference_NK > 0) == (test.truth_NK > 0))
    hit_NK = np.where(np.abs(test.truth_NK) < 1e-9, np.nan, hit_NK)
    return [float(value) for value in np.nanmean(hit_NK, axis=0)]


def _fit(
    settings: Settings, pairs: World, heads: Sequence[str], log_odds_NH: FloatArray, seed: int
) -> Any:
    from morlaif_ray.config.preferring import PreferenceConfig
    from morlaif_ray.preference import PreferenceModel
    from morlaif_ray.preference.training import TrainingData, train_preference_model

    model = PreferenceModel.from_backbone(
        settings.backbone, heads, max_length=MAX_LENGTH, seed=derive_seed(seed, "preference")
    )
    per_epoch = -(-len(pairs.pair_ids) // 32)
    recipe = PreferenceConfig(
        topology="shared_trunk",
        num_epochs=max(2, -(-settings.min_steps // per_epoch)),
        batch_size=32,
        learning_rate=settings.learning_rate,
        warmup_steps=20,
        max_length=MAX_LENGTH,
    )
    with tempfile.TemporaryDirectory() as scratch:
        train_preference_model(
            model,
            TrainingData(pairs.texts_a, pairs.texts_b, log_odds_NH, pairs.pair_ids),
            recipe,
            seed=derive_seed(seed, "preference"),
            checkpoint_dir=Path(scratch),
            checkpoint_every=1 << 30,
        )
    return model


def _keep_seed(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """`run_seed`, or what it left in the folder."""
    path = folder / f"seed{seed}.json"
    if not path.is_file():
        write_json(path, run_seed(settings, seed))
    found: dict[str, Any] = read_json(path)
    return found


def _run_seeds(
    settings: Settings, folder: Path, num_seeds: int, processes: int
) -> list[dict[str, Any]]:
    if processes == 1:
        return [_keep_seed(settings, seed, folder) for seed in range(num_seeds)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as executor:
        work = ([settings] * num_seeds, range(num_seeds), [folder] * num_seeds)
        return list(executor.map(_keep_seed, *work))


if __name__ == "__main__":
    main()
