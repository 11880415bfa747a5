"""Tokens per second and model FLOP utilisation of the learner step and the panel on one GPU, bfloat16, random models.

    python -m benchmarks.ppo_gpu [--models gpt2-medium llama-1b] [--steps 5] [--json FILE]
    python -m benchmarks.ppo_gpu --device cpu --tiny        a trial without a GPU

Needs torch, transformers, peft and the library's own small dependencies; neither ray nor vllm nor trl. MFU = the
operations that a step cannot do without (recomputation and padding not counted) / seconds / peak, where the peak is
the data sheet's dense bfloat16 figure; beside it the share of the best large matmul measured here. Last line: one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from morlaif_ray.backbone import build_word_tokenizer
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.preference import PreferenceModel
from morlaif_ray.rl.learner import PPOLearner
from morlaif_ray.types import RolloutBatch

DATA_SHEET_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10": 125.0}
"""Dense bfloat16 with float32 accumulation, SXM boards; NVIDIA's data sheets."""
NUM_HEADS = 12


@dataclass(frozen=True)
class Shape:
    """A model to make and the batch that it works on."""

    kind: str
    width: int
    inner: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int
    batch: int
    microbatch: int
    prompt_tokens: int = 256
    response_tokens: int = 256

    @property
    def trunk_parameters(self) -> int:
        """Matrix entries that every token meets."""
        attention = 2 * self.width**2 * (1 + self.num_kv_heads / self.num_heads)
        matrices = 2 if self.kind == "gpt2" else 3
        return int(self.num_layers * (attention + matrices * self.width * self.inner))

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.response_tokens

    def trunk_flops(self) -> float:
        """Forward of the batch through the trunk: 2 per matrix entry, and attention over the half before a token."""
        tokens = self.batch * self.length
        return tokens * (
            2.0 * self.trunk_parameters + 2.0 * self.num_layers * self.length * self.width
        )

    def head_flops(self) -> float:
        return 2.0 * self.batch * self.response_tokens * self.vocabulary * self.width


SHAPES = {
    "gpt2-medium": Shape("gpt2", 1024, 4096, 24, 16, 16, 50_257, batch=64, microbatch=16),
    "llama-1b": Shape("llama", 2048, 5632, 22, 32, 4, 32_000, batch=64, microbatch=16),
}
TINY = {
    "gpt2-medium": Shape("gpt2", 32, 128, 2, 2, 2, 300, 8, 4, 8, 8),
    "llama-1b": Shape("llama", 32, 96, 2, 4, 2, 300, 8, 4, 8, 8),
}


def main() -> None:
    options = _options()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: no CUDA device here; run on a GPU, or try --device cpu --tiny for a trial"
        )
    torch.set_float32_matmul_precision("high")
    measured = matmul_tflops(options.device)
    sheet = _data_sheet(options.device)
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "matmul_tflops": round(measured, 3),
        "data_sheet_tflops": sheet,
    }
    print(
        f"{figures['device']}, torch {torch.__version__}: best bfloat16 matmul {measured:.1f} TFLOP/s"
    )
    for name in options.models:
        shape = (TINY if options.tiny else SHAPES)[name]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            make_model(shape, folder)
            for variant, settings in variants().items():
                label = f"{name} learner, {variant}"
                seconds, flops = time_learner(shape, folder, settings, options)
                figures[label] = report(label, shape, seconds, flops, measured, sheet, options)
            label = f"{name} panel, one trunk with {NUM_HEADS} heads"
            seconds, flops = time_panel(shape, folder, options)
            figures[label] = report(label, shape, seconds, flops, measured, sheet, options)
    text = json.dumps(figures)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=5, help="timed steps after one warm-up")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def variants() -> dict[str, dict[str, Any]]:
    """Name -> (weights' type, settings of `policy`)."""
    found: dict[str, dict[str, Any]] = {
        "full, bfloat16": {"dtype": "bfloat16"},
        "LoRA, bfloat16": {
            "dtype": "bfloat16",
            "lora": {"rank": 16, "alpha": 32.0, "target_modules": "all-linear"},
        },
    }
    if "bf16_autocast" in PolicyConfig.model_fields:
        found["full, float32 weights, bfloat16 compute"] = {
            "dtype": "float32",
            "bf16_autocast": True,
        }
    return found


def make_model(shape: Shape, folder: Path) -> None:
    """A random model of that shape as a Hugging Face folder, with a word-level tokenizer of 297 words."""
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        LlamaConfig,
    )

    words = " ".join(f"w{i}" for i in range(297))
    tokenizer = build_word_tokenizer([words], vocabulary_size=300, max_length=4096)
    ends = {
        name: getattr(tokenizer, f"{source}_token_id")
        for name, source in (
            ("bos_token_id", "eos"),
            ("eos_token_id", "eos"),
            ("pad_token_id", "pad"),
        )
    }
    if shape.kind == "gpt2":
        config: Any = GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=1024,
            n_embd=shape.width,
            n_inner=shape.inner,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            **ends,
        )
    else:
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            max_position_embeddings=2048,
            **ends,
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_batch(shape: Shape, seed: int) -> RolloutBatch:
    """Random tokens; every response fills its length, so nothing is padding."""
    rng = np.random.default_rng(seed)
    num = shape.batch
    return RolloutBatch(
        prompts=("",) * num,
        responses=("",) * num,
        tokens_BL=rng.integers(3, 300, size=(num, shape.length)),
        prompt_lengths_B=np.full(num, shape.prompt_tokens),
        response_lengths_B=np.full(num, shape.response_tokens),
        logprobs_BT=np.zeros((num, shape.response_tokens), dtype=np.float32),
        truncated_B=np.ones(num, dtype=np.bool_),
        policy_version=0,
    )


def time_learner(
    shape: Shape, folder: Path, settings: dict[str, Any], options: argparse.Namespace
) -> tuple[float, float]:
    """(median seconds, FLOPs) of one PPO step: old log-probabilities, reference, 4 epochs."""
    changes = {key: value for key, value in settings.items() if key != "dtype"}
    config = PolicyConfig.model_validate(
        {
            "batch_size": shape.batch,
            "microbatch_size": shape.microbatch,
            "num_epochs": 4,
            "num_minibatches": 4,
            "max_new_tokens": shape.response_tokens,
            **changes,
        }
    )
    learner = PPOLearner(
        str(folder), config, seed=0, dtype=settings["dtype"], device=options.device
    )
    rng = np.random.default_rng(0)
    batches = [(make_batch(shape, i), rng.normal(size=shape.batch)) for i in range(2)]
    counter = iter(range(1 << 30))

    def step() -> None:
        batch, reward = batches[next(counter) % 2]
        learner.update(batch, reward)

    seconds = _median_seconds(step, options)
    forward = shape.trunk_flops() + shape.head_flops()
    # With adapters the frozen matrices need no gradient of their own.
    backward = 1.0 if "lora" in settings else 2.0
    return seconds, forward * (2.0 + config.num_epochs * (1.0 + backward))


def time_panel(shape: Shape, folder: Path, options: argparse.Namespace) -> tuple[float, float]:
    """(median seconds, FLOPs) of scoring the batch on all heads of one bfloat16 trunk."""
    heads = [f"head{i}" for i in range(NUM_HEADS)]
    model = PreferenceModel.from_backbone(
        str(folder), heads, max_length=shape.length, seed=0, dtype="bfloat16"
    )
    model.model.to(options.device).eval()
    rows = make_batch(shape, 0).tokens_BL.tolist()

    @torch.no_grad()
    def step() -> None:
        for start in range(0, len(rows), shape.microbatch):
            model.forward(rows[start : start + shape.microbatch]).cpu()

    return _median_seconds(step, options), shape.trunk_flops()


def report(
    label: str,
    shape: Shape,
    seconds: float,
    flops: float,
    measured: float,
    sheet: float | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Prints and returns the figures of one measurement."""
    tokens = shape.batch * shape.length / seconds
    rate = flops / seconds / 1e12
    figures: dict[str, Any] = {
        "seconds": round(seconds, 4),
        "tokens_per_s": round(tokens),
        "tflop": round(flops / 1e12, 3),
        "share_of_matmul": round(rate / measured, 3),
        "mfu": None if sheet is None else round(rate / sheet, 3),
    }
    if options.device == "cuda":
        figures["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    shown = ", ".join(f"{key} {value}" for key, value in figures.items())
    print(f"{label}: {shown}", flush=True)
    return figures


def _median_seconds(step: Callable[[], None], options: argparse.Namespace) -> float:
    def wait() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    step()
    seconds = []
    for _ in range(options.steps):
        wait()
        started = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def matmul_tflops(device: str) -> float:
    """Best of ten products of square bfloat16 matrices, TFLOP/s."""
    n = 8192 if device == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    best = math.inf
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * n**3 / best / 1e12


def _data_sheet(device: str) -> float | None:
    """The board's dense bfloat16 peak; None where it is not known."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    for board, peak in DATA_SHEET_TFLOPS.items():
        if board in name:
            return peak
    print(f"no data-sheet figure for {name}: mfu is null", file=sys.stderr)
    return None


if __name__ == "__main__":
    main()
