"""What it costs to score all principles, and what each topology is worth.

    python -m benchmarks.panel [--quick] [--only costs lengths pooling accuracy] [--backbone FOLDER] [--hh FILE]

Costs: 12 principles as one trunk, with late branches, as adapters in one pass, against one forward of one PM and
against PEFT's switching and mixed batch; two sizes of GPT-2 (untrained: time does not depend on weights). Lengths:
padding and texts per second on hh-harmless dialogues against `model(**tokenizer(texts, padding=True))` in arrival
order. Pooling: the same model and texts through vLLM's pooling runner (`benchmarks/panel_pooling.py`; null where vLLM
is not installed). Accuracy: the test-bed's held-out prompts, every topology trained on the same pairs
(`benchmarks/panel_accuracy.py`).

Late branches always compute the last block for the last token alone (`last_block_at_end`). `late_branch_time_ratio` is
therefore over one PM that does so too; `late_branch_time_ratio_vs_default` over one PM as it is by default. Trunk and
its one PM are both without.

One thread. Everything that is compared is measured in turns in one process; medians. The figures are CPU seconds of
the process (on a machine that others use, wall time measures the others); `wall` figures stand beside them. Last line:
one JSON object; nothing here is asserted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NUM_PRINCIPLES = 12
HH = Path("../shared/data/hh-harmless-test/test.jsonl.gz")
PARTS = ("costs", "lengths", "pooling", "accuracy")
LIMITS = {
    "trunk_time_ratio": "<= 1.15",
    "late_branch_time_ratio": "<= 4",
    "adapters_speedup_batch8": ">= 1.5",
    "adapters_max_abs_diff": "<= 1e-5",
    "padding_waste": "< 0.10",
    "throughput_ratio_vs_plain": ">= 2",
}
MEANINGS = {
    "trunk_time_ratio": "12 heads on one trunk, over one PM; both compute the last block whole",
    "late_branch_time_ratio": "over one PM; both compute the last block for the last token alone",
    "late_branch_time_ratio_vs_default": "the same over one PM that computes its last block whole",
    "last_block_at_end_time_ratio": "one PM, last block for the last token alone over whole",
    "adapters_speedup_batch8": "bank against PEFT switching 12 adapters, 8 texts",
    "adapters_speedup_vs_peft_mixed_batch8": "bank against PEFT's mixed batch (adapter_names), 8 texts",
    "adapters_max_abs_diff": "of a score, bank against both ways of PEFT, all batches",
    "padding_waste": "share of padding, all dialogues",
    "throughput_ratio_vs_plain": "texts per second against padded batches in arrival order",
    "pooling_speedup": "CPU seconds of the panel's scoring over those of vLLM's pooling runner",
}


@dataclass(frozen=True)
class Size:
    """A GPT-2 to measure on."""

    name: str
    width: int
    num_layers: int
    num_heads: int


SIZES = (Size("medium", 256, 12, 8), Size("testbed", 96, 3, 4))
"""Twelve blocks, whose last quarter is three, and the model of the shipped demo."""


def main() -> None:
    import torch
    import transformers

    options = _parse()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    figures: dict[str, Any] = {"load_before": os.getloadavg()[0], "quick": options.quick}
    figures["peak_gflops"] = round(matmul_peak(), 1)
    with tempfile.TemporaryDirectory() as scratch:
        if "costs" in options.only:
            for size in SIZES[1:] if options.quick else SIZES:
                print(f"costs of a {size.num_layers} x {size.width} GPT-2", flush=True)
                found = measure_costs(size, Path(scratch) / size.name, options)
                main_size = size is SIZES[0] or options.quick
                figures |= {k if main_size else f"{k}_{size.name}": v for k, v in found.items()}
        if "lengths" in options.only:
            figures |= measure_lengths(Path(scratch) / "lengths", options)
        if "pooling" in options.only:
            from benchmarks.panel_pooling import measure_pooling

            figures |= measure_pooling(Path(scratch) / "pooling", options)
        if "accuracy" in options.only:
            from benchmarks.panel_accuracy import measure_accuracy

            figures |= measure_accuracy(Path(scratch) / "accuracy", options)
    figures["load_after"] = os.getloadavg()[0]
    for name, value in figures.items():
        limit = f"   (limit {LIMITS[name]})" if name in LIMITS else ""
        meaning = f"   {MEANINGS[name]}" if name in MEANINGS else ""
        print(f"{name:42s} {value}{limit}{meaning}")
    print(json.dumps(figures))


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, figures of no worth")
    parser.add_argument(
        "--only",
        nargs="+",
        type=lambda text: text.split(","),
        default=[PARTS],
        help=f"parts of {', '.join(PARTS)}, with spaces or commas",
    )
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--hh", type=Path, default=HH, help="hh dialogues (skipped where absent)")
    parser.add_argument("--texts", type=int, default=512, help="dialogues of the throughput")
    parser.add_argument("--backbone", help="test-bed SFT model; default: train a small one")
    parser.add_argument("--pairs", type=int, default=2400, help="training pairs of the accuracies")
    parser.add_argument("--test", type=int, default=1500, help="held-out pairs")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of the accuracies")
    options = parser.parse_args(arguments)
    options.only = [part for parts in options.only for part in parts]
    if wrong := [part for part in options.only if part not in PARTS]:
        parser.error(f"--only: no part '{wrong[0]}'; write some of {', '.join(PARTS)}")
    if options.quick:
        options.repetitions, options.texts = 2, 64
        options.pairs, options.test, options.epochs = 48, 60, 1
        options.seeds = 2
    return options


# ---------------------------------------------------------------- the clock


@dataclass(frozen=True)
class Spent:
    """Medians over the repetitions, by name."""

    cpu_s: dict[str, float]
    wall_s: dict[str, float]

    def ratio(self, name: str, base: str) -> float:
        return round(self.cpu_s[name] / self.cpu_s[base], 3)

    def wall_ratio(self, name: str, base: str) -> float:
        return round(self.wall_s[name] / self.wall_s[base], 3)


def in_turns(work: Mapping[str, Callable[[], Any]], repetitions: int) -> Spent:
    """Runs all of them once to warm up, then in turns: what disturbs one disturbs its neighbours."""
    cpu: dict[str, list[float]] = {name: [] for name in work}
    wall: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repetitions + 1):
        for name, call in work.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            call()
            if turn:
                cpu[name].append(time.process_time() - cpu_s)
                wall[name].append(time.perf_counter() - wall_s)
    return Spent(
        {name: statistics.median(values) for name, values in cpu.items()},
        {name: statistics.median(values) for name, values in wall.items()},
    )


def matmul_peak(width: int = 1024) -> float:
    """The physical limit: GFLOP per CPU second of a large float32 product on one thread, by the faster library."""
    import torch
    from torch.nn.functional import linear

    from morlaif_ray.cpu_products import fast_products

    left, right = torch.randn(width, width), torch.randn(width, width)
    with fast_products():
        spent = in_turns({"mm": lambda: left @ right, "linear": lambda: linear(left, right)}, 7)
    return 2 * width**3 / min(spent.cpu_s.values()) / 1e9


# ---------------------------------------------------------------- costs


def make_backbone(size: Size, folder: Path) -> str:
    """An untrained GPT-2 with the words of the test-bed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from morlaif_ray.backbone import build_word_tokenizer, save_pretrained
    from morlaif_ray.testbed import vocabulary

    tokenizer = build_word_tokenizer(
        [" ".join(sorted(vocabulary()))], vocabulary_size=2000, max_length=512
    )
    settings = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=size.width,
        n_layer=size.num_layers,
        n_head=size.num_heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_pretrained(GPT2LMHeadModel(settings), tokenizer, folder)
    return str(folder)


def testbed_texts(num: int) -> list[str]:
    """Dialogues of the test-bed, 30 to 90 words."""
    import random

    from morlaif_ray.backbone import dialogue_text
    from morlaif_ray.testbed import make_prompts, sample_response

    prompts = make_prompts(num, 3)
    return [dialogue_text(prompt, sample_response(prompt, random.Random(0))) for prompt in prompts]


def measure_costs(size: Size, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.panel_adapters import measure_adapters
    from morlaif_ray.cpu_products import fast_products
    from morlaif_ray.preference import PreferenceModel

    backbone = make_backbone(size, folder / "backbone")
    names = [f"principle{i}" for i in range(NUM_PRINCIPLES)]

    def make(topology: str, heads: Sequence[str]) -> PreferenceModel:
        return PreferenceModel.from_backbone(
            backbone, heads, max_length=512, seed=0, topology=topology
        )

    one, short = make("separate", names[:1]), make("separate", names[:1])
    short.last_block_at_end = True
    trunk = make("shared_trunk", names)
    late = make("late_branching", names)
    texts = testbed_texts(32)
    ids = one.encode(texts)
    for model in (one, short, trunk, late):
        model.model.eval()
    with torch.no_grad(), fast_products():
        spent = in_turns(
            {
                "one": lambda: one.forward(ids),
                "short": lambda: short.forward(ids),
                "trunk": lambda: trunk.forward(ids),
                "late": lambda: late.forward(ids),
            },
            options.repetitions,
        )
    flops = 2 * 12 * size.num_layers * size.width**2 * len(ids) * max(map(len, ids))
    peak = matmul_peak()
    return {
        "trunk_time_ratio": spent.ratio("trunk", "one"),
        "trunk_time_ratio_wall": spent.wall_ratio("trunk", "one"),
        "late_branch_time_ratio": spent.ratio("late", "short"),
        "late_branch_time_ratio_wall": spent.wall_ratio("late", "short"),
        "late_branch_time_ratio_vs_default": spent.ratio("late", "one"),
        "last_block_at_end_time_ratio": spent.ratio("short", "one"),
        "one_forward_cpu_s": round(spent.cpu_s["one"], 4),
        "one_forward_share_of_peak": round(flops / spent.cpu_s["one"] / 1e9 / peak, 3),
        **measure_adapters(backbone, names, folder, options.repetitions),
    }


# ---------------------------------------------------------------- lengths


def hh_texts(path: Path) -> list[str]:
    """All chosen and rejected dialogues, in file order."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row[side] for row in rows for side in ("chosen", "rejected")]


def measure_lengths(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Padding and throughput on real dialogues of 20 to 512 tokens."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from morlaif_ray.backbone import save_pretrained
    from morlaif_ray.length_groups import cheapest_groups, pass_overhead_tokens
    from morlaif_ray.preference import PreferenceModel
    from morlaif_ray.preference.batching import length_batches, padding_waste
    from morlaif_ray.preference.training import plan_batches

    if not options.hh.is_file():
        print(f"lengths: {options.hh} is absent; give --hh")
        return {"padding_waste": None, "throughput_ratio_vs_plain": None}
    everything = hh_texts(options.hh)
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(everything, vocab_size=8000, special_tokens=["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, eos_token="<eos>")
    tokenizer.pad_token = tokenizer.eos_token
    settings = GPT2Config(
        vocab_size=8000,
        n_positions=512,
        n_embd=128,
        n_layer=4,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_pretrained(GPT2LMHeadModel(settings), tokenizer, folder)
    model = PreferenceModel.from_backbone(str(folder), ["a"], max_length=512, seed=0)
    lengths = [len(row) for row in model.encode(everything)]
    limit = 8192
    pairs = np.array(lengths).reshape(-1, 2)
    steps = plan_batches(pairs.max(axis=1), 32, 1, 0)
    rows = [[2 * r + side for r in step for side in (0, 1)] for step in steps]
    grouped = [
        [step[i] for i in batch]
        for step in rows
        for batch in length_batches([lengths[r] for r in step], len(step), limit // 2)
    ]
    arrival = [list(range(i, min(i + 64, len(lengths)))) for i in range(0, len(lengths), 64)]
    texts = everything[:: max(1, len(everything) // options.texts)][: options.texts]
    classifier = model.model.eval()

    def plain() -> None:
        for start in range(0, len(texts), 64):
            batch = tokenizer(
                texts[start : start + 64],
                padding=True,
                truncation=True,
                max_length=512,
                return_tensors="pt",
            )
            batch.pop("token_type_ids", None)
            classifier(**batch)

    with torch.no_grad():
        spent = in_turns(
            {"ours": lambda: model.score_heads(texts, max_tokens=limit), "plain": plain},
            max(2, options.repetitions // 2),
        )
    overhead = pass_overhead_tokens(model.model)
    waste = {
        "padding_waste": padding_waste(lengths, cheapest_groups(lengths, 64, limit, overhead)),
        "padding_waste_512_texts": padding_waste(
            lengths[:512], cheapest_groups(lengths[:512], 64, limit, overhead)
        ),
        "padding_waste_training": padding_waste(lengths, grouped),
        "padding_waste_training_without_token_limit": padding_waste(lengths, rows),
        "padding_waste_arrival_order": padding_waste(lengths, arrival),
    }
    return {
        **{name: round(value, 4) for name, value in waste.items()},
        "throughput_ratio_vs_plain": spent.ratio("plain", "ours"),
        "throughput_ratio_vs_plain_wall": spent.wall_ratio("plain", "ours"),
        "texts_per_cpu_s": round(len(texts) / spent.cpu_s["ours"], 1),
        "mean_tokens": round(statistics.mean(lengths), 1),
    }


if __name__ == "__main__":
    main()
