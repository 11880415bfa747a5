"""Preference models on people's labels: accuracy with intervals for each topology. Data paths come by argument.

    python -m benchmarks.real_labels --hh test.jsonl.gz --finegrained dev_feedback.json [--backbone FOLDER]

hh: one head, people's choice. Fine-grained QA feedback (Wu et al. 2023): people's choice among four answers, and per
kind of error "the corrected answer is better", one head each. Split by prompt text. Without --backbone a small GPT-2
with random weights is the trunk, so the figures say what labels alone give a tiny model, not what the method can reach.
The last line is one JSON object of all figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from morlaif_ray.backbone.dialogue import dialogue_text
from morlaif_ray.config.inputs import LoraConfig, ScratchModel
from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.data.rewardbench import read_rewardbench
from morlaif_ray.evaluation.statistics import mean_interval
from morlaif_ray.seeding import unit_interval
from morlaif_ray.types import FloatArray

HUMAN = "human"
ERROR_HEADS = {
    "Irrelevant": "relevance",
    "Redundant": "conciseness",
    "Wrong-Grounding": "grounding",
}
MISSING_HEAD = "completeness"
TOPOLOGIES = ("separate", "adapters", "shared_trunk")
TEST_SHARE = 0.3


@dataclass(frozen=True)
class LabelledPair:
    prompt: str
    first: str
    second: str
    labels: dict[str, float]
    """Head -> 1.0 where the first response is better, 0.0 where the second."""


def read_hh(path: Path) -> list[LabelledPair]:
    pairs = read_rewardbench(str(path)).pairs
    return [_shuffled(pair.prompt, pair.chosen, pair.rejected, [HUMAN]) for pair in pairs]


def read_finegrained(path: Path) -> list[LabelledPair]:
    """People's preferences among four predictions, and the first one against its correction."""
    found = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        prompt = f"\n\nHuman: {row['question']}\n\nAssistant:"
        texts = [row[f"prediction {number}"] for number in (1, 2, 3, 4)]
        order = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        for (i, j), choice in zip(order, row["preference"], strict=True):
            if choice and texts[i] != texts[j]:
                good, bad = (i, j) if choice == 1 else (j, i)
                found.append(_shuffled(prompt, texts[good], texts[bad], [HUMAN]))
        feedback = row["feedback"]
        heads = {
            ERROR_HEADS[error["error type"]]
            for error in feedback["errors"]
            if error["error type"] in ERROR_HEADS
        }
        heads |= {MISSING_HEAD} if feedback["missing-info"] else set()
        corrected = feedback["corrected-prediction"]
        if heads and corrected.strip() and corrected != texts[0]:
            found.append(_shuffled(prompt, corrected, texts[0], sorted(heads)))
    return found


def _shuffled(prompt: str, good: str, bad: str, heads: Sequence[str]) -> LabelledPair:
    """The better response first or second by a coin that depends on the texts alone."""
    if unit_interval("slot", prompt, good, bad) < 0.5:
        return LabelledPair(prompt, good, bad, dict.fromkeys(heads, 1.0))
    return LabelledPair(prompt, bad, good, dict.fromkeys(heads, 0.0))


def is_test(pair: LabelledPair) -> bool:
    return unit_interval("real labels", pair.prompt) < TEST_SHARE


def label_matrix(pairs: Sequence[LabelledPair], heads: Sequence[str]) -> FloatArray:
    """Log-odds [N, H]: infinite for a person's choice, NaN where no one chose."""
    values = [[pair.labels.get(head, np.nan) for head in heads] for pair in pairs]
    labels = np.array(values, dtype=np.float64)
    return np.where(np.isnan(labels), np.nan, np.where(labels > 0.5, np.inf, -np.inf))


def trainings(topology: str, heads: Sequence[str]) -> list[list[str]]:
    return [list(heads)] if topology == "shared_trunk" else [[head] for head in heads]


def measure(
    name: str,
    pairs: Sequence[LabelledPair],
    backbone: str,
    config: PreferenceConfig,
    topologies: Sequence[str],
    limit: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """One record per topology and head."""
    train = [pair for pair in pairs if not is_test(pair)][:limit]
    test = [pair for pair in pairs if is_test(pair)]
    heads = sorted({head for pair in train for head in pair.labels})
    say(f"{name}: {len(train)} training pairs, {len(test)} test pairs, heads {', '.join(heads)}")
    for topology in topologies:
        started = time.process_time()
        gaps: dict[str, FloatArray] = {}
        for columns in trainings(topology, heads):
            gaps.update(_train_and_score(train, test, columns, backbone, config, topology))
        seconds = time.process_time() - started
        for head in heads:
            yield _record(name, topology, head, gaps[head], test, seconds)
    words = np.array([float(len(p.first.split()) - len(p.second.split())) for p in test])
    for head in heads:
        yield _record(name, "number_of_words", head, words, test, 0.0)


def _train_and_score(
    train: Sequence[LabelledPair],
    test: Sequence[LabelledPair],
    heads: list[str],
    backbone: str,
    config: PreferenceConfig,
    topology: str,
) -> dict[str, FloatArray]:
    from morlaif_ray.preference import PreferenceModel
    from morlaif_ray.preference.training import TrainingData, train_preference_model

    lora = LoraConfig() if topology == "adapters" else None
    own = [pair for pair in train if any(head in pair.labels for head in heads)]
    model = PreferenceModel.from_backbone(
        backbone, heads, max_length=config.max_length, seed=1, lora=lora
    )
    data = TrainingData(
        [dialogue_text(pair.prompt, pair.first) for pair in own],
        [dialogue_text(pair.prompt, pair.second) for pair in own],
        label_matrix(own, heads),
        [f"{number}" for number in range(len(own))],
    )
    with tempfile.TemporaryDirectory() as folder:
        train_preference_model(model, data, config, seed=1, checkpoint_dir=Path(folder))
    first = model.score_heads([dialogue_text(pair.prompt, pair.first) for pair in test])
    second = model.score_heads([dialogue_text(pair.prompt, pair.second) for pair in test])
    return {head: first[:, at] - second[:, at] for at, head in enumerate(heads)}


def _record(
    data: str,
    topology: str,
    head: str,
    gap: FloatArray,
    test: Sequence[LabelledPair],
    seconds: float,
) -> dict[str, Any]:
    labels = np.array([pair.labels.get(head, np.nan) for pair in test], dtype=np.float64)
    credit = np.where(np.isnan(labels), np.nan, 0.5 * (1.0 + np.sign(gap) * (2.0 * labels - 1.0)))
    share = mean_interval(credit, groups_N=[pair.prompt for pair in test], num_resamples=2000)
    return {
        "data": data,
        "topology": topology,
        "head": head,
        "accuracy": round(share.value, 4),
        "low": round(share.low, 4),
        "high": round(share.high, 4),
        "num_pairs": int((~np.isnan(labels)).sum()),
        "num_prompts": share.num,
        "train_cpu_s": round(seconds, 1),
    }


def scratch_backbone(texts: Sequence[str], folder: Path, max_length: int) -> str:
    """A small GPT-2 with random weights and a word-level tokenizer of these texts."""
    from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer, save_pretrained

    tokenizer = build_word_tokenizer(texts, vocabulary_size=6000, max_length=max_length)
    size = ScratchModel(width=64, num_layers=2, num_heads=4, max_length=max_length)
    save_pretrained(build_scratch_model(size, tokenizer, seed=1), tokenizer, folder)
    return str(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_labels", description=__doc__)
    parser.add_argument("--hh", type=Path, help="hh-rlhf dialogues with chosen and rejected")
    parser.add_argument("--finegrained", type=Path, help="dev_feedback.json of qa-feedback")
    parser.add_argument("--backbone", help="folder or hub id of a causal LM; default: random")
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--limit", type=int, default=1000, help="training pairs of each data set")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=128)
    options = parser.parse_args(arguments)
    data = {}
    if options.hh:
        data["hh"] = read_hh(options.hh)
    if options.finegrained:
        data["finegrained"] = read_finegrained(options.finegrained)
    if not data:
        parser.error("give --hh FILE, --finegrained FILE, or both")
    config = PreferenceConfig(
        num_epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_steps=10,
        max_length=options.max_length,
    )
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, pairs in data.items():
            texts = [dialogue_text(p.prompt, p.first) for p in pairs if not is_test(p)]
            backbone = options.backbone or scratch_backbone(
                texts, Path(folder, name), options.max_length
            )
            for record in measure(
                name, pairs, backbone, config, options.topologies, options.limit, print
            ):
                records.append(record)
                print(
                    f"  {record['topology']:>16} {record['head']:>14} {record['accuracy']:.3f} "
                    f"[{record['low']:.3f}, {record['high']:.3f}] on {record['num_pairs']} pairs"
                )
    print(json.dumps({"backbone": options.backbone or "scratch", "accuracy": records}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
