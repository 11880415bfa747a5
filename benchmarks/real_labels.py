"""Preference models on people's labels: accuracy with intervals for each topology. Data paths come by argument.

    python -m benchmarks.real_labels --hh test.jsonl.gz --finegrained dev_feedback.json [--backbone FOLDER]

hh: one head, people's choice (with one head every full-weight topology is the same model: trained once). Fine-grained
QA feedback (Wu et al. 2023): people's choice among four answers, and per kind of error "the corrected answer is
better", one head each; the passages behind the answers are not shown. Split by prompt text. Where several learning
rates or epochs are given, they are chosen per topology on a fifth of the training prompts; then the model is trained on
all of them and the test prompts are scored once. Adapters learn at ten times the given rates. Beside the models: the
longer response, length with the direction of the training pairs, and the slot that more training labels prefer. Without
--backbone a small GPT-2 with random weights is the trunk, so the figures say what labels alone give a tiny model, not
what the method can reach. One thread; CPU seconds of training. The last line is one JSON object of all figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_label_pairs import (
    LabelledPair,
    credit,
    is_test,
    is_validation,
    label_matrix,
    length_gaps,
    mean_accuracy,
    read_finegrained,
    read_hh,
)
from morlaif_ray.backbone.dialogue import dialogue_text
from morlaif_ray.config.inputs import LoraConfig, ScratchModel
from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.errors import ConfigError, NumericalError
from morlaif_ray.evaluation.statistics import mean_interval, pearson
from morlaif_ray.types import FloatArray

TOPOLOGIES = ("separate", "shared_trunk", "late_branching", "adapters")
ADAPTER_FACTOR = 10
"""Adapters are trained at this many times the given learning rates."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    learning_rate: float
    num_epochs: int

    def __str__(self) -> str:
        return f"{self.learning_rate:.0e} x {self.num_epochs}"


def trainings(topology: str, heads: Sequence[str]) -> list[list[str]]:
    together = topology in ("shared_trunk", "late_branching")
    return [list(heads)] if together else [[head] for head in heads]


class Bench:
    """Trains on one data set; the backbone and what the options say are fixed."""

    def __init__(
        self, name: str, pairs: Sequence[LabelledPair], backbone: str, options: argparse.Namespace
    ) -> None:
        self.name = name
        self.backbone = backbone
        self.options = options
        self.train = [pair for pair in pairs if not is_test(pair)][: options.limit]
        self.test = [pair for pair in pairs if is_test(pair)]
        named = [
            {head for pair in side for head in pair.labels} for side in (self.train, self.test)
        ]
        self.heads = sorted(named[0] & named[1])
        self.recipes = [
            Recipe(rate, epochs)
            for rate, epochs in itertools.product(options.rates, options.epochs)
        ]

    def records(self, topologies: Sequence[str], say: Say) -> Iterator[dict[str, Any]]:
        """One record per topology and head, then those of the baselines."""
        counts = Counter(head for pair in self.train for head in pair.labels)
        shown = ", ".join(f"{head} {counts[head]}" for head in self.heads)
        say(f"{self.name}: {len(self.train)} training pairs ({shown}), {len(self.test)} test pairs")
        same: dict[str, Any] = {}
        for topology in topologies:
            full = topology != "adapters"
            try:
                if full and len(self.heads) == 1 and same:
                    self._untrained(topology, self.heads)  # refused where the backbone cannot be it
                    yield {**same, "topology": topology, "same_model_as": same["topology"]}
                    continue
                recipe, seen = self._choose(topology, say)
                gaps, seconds = self._train(topology, recipe, self.train, self.test)
            except (ConfigError, NumericalError) as error:
                say(f"  {topology}: {error}")
                continue
            extra = {
                "train_cpu_s": round(seconds, 1),
                "learning_rate": recipe.learning_rate * (1 if full else ADAPTER_FACTOR),
                "epochs": recipe.num_epochs,
                "validation_accuracy": seen,
            }
            for head in self.heads:
                record = self._record(topology, head, gaps[head]) | extra
                same = record if full and not same else same
                yield record
        yield from self._baselines()

    def _choose(self, topology: str, say: Say) -> tuple[Recipe, float | None]:
        """The recipe with the best mean over heads of the accuracy on validation prompts, and that accuracy.

        A recipe that diverges is out; heads without a validation pair do not count.
        """
        if len(self.recipes) == 1:
            return self.recipes[0], None
        inside = [pair for pair in self.train if not is_validation(pair)]
        outside = [pair for pair in self.train if is_validation(pair)]
        found: list[float] = []
        for recipe in self.recipes:
            try:
                gaps, seconds = self._train(topology, recipe, inside, outside)
            except NumericalError as error:
                found.append(np.nan)
                say(f"  {topology} {recipe}: {error}")
                continue
            found.append(mean_accuracy(gaps, label_matrix(outside, self.heads), self.heads))
            say(f"  {topology} {recipe}: {found[-1]:.3f} on validation, {seconds:.0f} CPU s")
        if np.isnan(found).all():
            raise ConfigError(
                f"{self.name}: no recipe of {topology} has an accuracy on validation prompts; give a higher --limit, "
                "or one rate and one number of epochs"
            )
        best = int(np.nanargmax(found))
        return self.recipes[best], round(found[best], 4)

    def _train(
        self,
        topology: str,
        recipe: Recipe,
        train: Sequence[LabelledPair],
        other: Sequence[LabelledPair],
    ) -> tuple[dict[str, FloatArray], float]:
        """(score differences of `other` by head, NaN where no one chose; CPU seconds of training)."""
        gaps: dict[str, FloatArray] = {}
        seconds = 0.0
        for heads in trainings(topology, self.heads):
            started = time.process_time()
            model = self._fit(topology, recipe, train, heads)
            seconds += time.process_time() - started
            labels = label_matrix(other, heads)
            seen = np.flatnonzero(~np.isnan(labels).all(axis=1))
            pairs = [other[row] for row in seen]
            first = model.score_heads([dialogue_text(p.prompt, p.first) for p in pairs])
            second = model.score_heads([dialogue_text(p.prompt, p.second) for p in pairs])
            labels[seen] = np.where(np.isnan(labels[seen]), np.nan, first - second)
            gaps |= dict(zip(heads, labels.T, strict=True))
        return gaps, seconds

    def _untrained(self, topology: str, heads: Sequence[str]) -> Any:
        from morlaif_ray.preference import PreferenceModel

        return PreferenceModel.from_backbone(
            self.backbone,
            heads,
            max_length=self.options.max_length,
            seed=self.options.seed,
            lora=LoraConfig() if topology == "adapters" else None,
            topology=topology,
        )

    def _fit(
        self, topology: str, recipe: Recipe, train: Sequence[LabelledPair], heads: Sequence[str]
    ) -> Any:
        from morlaif_ray.preference.training import TrainingData, train_preference_model

        config = PreferenceConfig(
            num_epochs=recipe.num_epochs,
            learning_rate=recipe.learning_rate * (ADAPTER_FACTOR if topology == "adapters" else 1),
            warmup_steps=10,
            batch_size=16,
            train_tokens_per_batch=4096,
            max_length=self.options.max_length,
            precision=self.options.precision,
            centering=0.001,
        )
        own = [pair for pair in train if any(head in pair.labels for head in heads)]
        model = self._untrained(topology, heads)
        model.tokens_per_batch = config.train_tokens_per_batch
        labels = label_matrix(own, heads)
        chosen = np.where(labels > 0.5, np.inf, -np.inf)
        data = TrainingData(
            [dialogue_text(pair.prompt, pair.first) for pair in own],
            [dialogue_text(pair.prompt, pair.second) for pair in own],
            np.where(np.isnan(labels), np.nan, chosen),
            [f"{number}" for number in range(len(own))],
        )
        with tempfile.TemporaryDirectory() as folder:
            train_preference_model(
                model,
                data,
                config,
                seed=self.options.seed,
                checkpoint_dir=Path(folder),
                checkpoint_every=1 << 30,
            )
        return model

    def _baselines(self) -> Iterator[dict[str, Any]]:
        words_train, words = length_gaps(self.train), length_gaps(self.test)
        for head in self.heads:
            labels = label_matrix(self.train, [head])[:, 0]
            longer = np.sign(np.nanmean(credit(words_train, labels)) - 0.5)
            slot = np.full(len(self.test), np.sign(np.nanmean(labels) - 0.5))
            yield self._record("longer_response", head, words)
            yield self._record("length_as_in_training", head, words * longer)
            yield self._record("majority_slot", head, slot)

    def _record(self, topology: str, head: str, gap: FloatArray) -> dict[str, Any]:
        labels = label_matrix(self.test, [head])[:, 0]
        groups = [pair.prompt for pair in self.test]
        share = mean_interval(credit(gap, labels), groups_N=groups, num_resamples=2000)
        present = ~np.isnan(labels)
        with_length = pearson(gap[present], length_gaps(self.test)[present])
        return {
            "data": self.name,
            "topology": topology,
            "head": head,
            "accuracy": round(share.value, 4),
            "low": round(share.low, 4),
            "high": round(share.high, 4),
            "length_correlation": None if np.isnan(with_length) else round(with_length, 3),
            "num_pairs": int(present.sum()),
            "num_prompts": share.num,
        }


def scratch_backbone(texts: Sequence[str], folder: Path, options: argparse.Namespace) -> str:
    """A small GPT-2 with random weights and a word-level tokenizer of these texts."""
    from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer, save_pretrained

    tokenizer = build_word_tokenizer(texts, vocabulary_size=6000, max_length=options.max_length)
    size = ScratchModel(
        width=options.width,
        num_layers=options.layers,
        num_heads=4,
        max_length=options.max_length,
    )
    save_pretrained(build_scratch_model(size, tokenizer, seed=1), tokenizer, folder)
    return str(folder)


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hh", type=Path, help="hh-rlhf dialogues with chosen and rejected")
    parser.add_argument("--finegrained", type=Path, help="dev_feedback.json of qa-feedback")
    parser.add_argument("--backbone", help="folder or hub id of a causal LM or an encoder")
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--limit", type=int, default=2000, help="training pairs of each data set")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--width", type=int, default=64, help="of the random GPT-2")
    parser.add_argument("--layers", type=int, default=2, help="of the random GPT-2")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    data = {}
    if options.hh:
        data["hh"] = read_hh(options.hh)
    if options.finegrained:
        data["finegrained"] = read_finegrained(options.finegrained)
    if not data:
        parser.error("give --hh FILE, --finegrained FILE, or both")
    return options, data


def main(arguments: Sequence[str] | None = None) -> int:
    import torch
    import transformers

    options, data = _parse(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def say(text: str) -> None:
        print(text, flush=True)

    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, pairs in data.items():
            texts = [dialogue_text(p.prompt, p.first) for p in pairs if not is_test(p)]
            backbone = options.backbone or scratch_backbone(texts, Path(folder, name), options)
            for record in Bench(name, pairs, backbone, options).records(options.topologies, say):
                records.append(record)
                say(
                    f"  {record['topology']:>21} {record['head']:>12} {record['accuracy']:.3f} "
                    f"[{record['low']:.3f}, {record['high']:.3f}] on {record['num_pairs']} pairs, "
                    f"with length {record['length_correlation']}, {record.get('train_cpu_s', 0)} CPU s"
                )
    settings = {
        name: getattr(options, name)
        for name in ("limit", "rates", "epochs", "max_length", "precision", "seed")
    }
    scratch = f"random GPT-2, {options.layers} x {options.width}"
    print(json.dumps({"backbone": options.backbone or scratch, **settings, "accuracy": records}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
