"""vLLM beside `transformers.generate` and our own sampler, on the same prompts and limits, in one process each in turn.

Part `engines` of `benchmarks.ppo`. Two workloads: every response fills its limit (`equal`), and lengths that vary as in
real dialogues (`varying`). The default engine of a device should be the faster one.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ppo_workload import NUM_PROMPTS, Size, make_workload
from morlaif_ray.rl.generation import SamplingSettings, TransformersEngine
from morlaif_ray.types import GenerationRequest, RolloutBatch

BATCH = 64
ROUNDS = 3
NEW_TOKENS = 64


def compare_engines(folder: Path, size: Size, *, with_vllm: bool) -> dict[str, Any]:
    """Tokens per second of every engine; `rollout_ratio_vllm_vs_generate` is for lengths that vary, None without vLLM.

    One thread each, as a rollout worker has.
    """
    torch.set_num_threads(1)
    rates: dict[str, dict[str, float]] = {}
    for name, mean in (("equal", None), ("varying", 48.0)):
        target = folder / name
        target.mkdir(parents=True)
        make_workload(target, size, topology="shared_trunk", mean_response_tokens=mean)
        model = target / "0_sft" / "model"
        prompts = _prompts(target)
        rates[name] = {
            "ours": _rate(TransformersEngine.from_path(model), prompts),
            "transformers.generate": _generate_rate(model, target),
        }
        print(f"{name:8s} " + ", ".join(f"{k} {v:.0f} tokens/s" for k, v in rates[name].items()))
    ratio = None
    if with_vllm:
        _add_vllm(folder, rates)
        varying = rates["varying"]
        ratio = round(varying["vllm"] / varying["transformers.generate"], 2)
    return {"rollout_ratio_vllm_vs_generate": ratio, "rollout_tokens_per_s": rates}


def _add_vllm(folder: Path, rates: dict[str, dict[str, float]]) -> None:
    vllm_engine = importlib.import_module("morlaif_ray.rl.vllm_engine")
    for name in rates:
        target = folder / name
        engine = vllm_engine.VllmEngine(str(target / "0_sft" / "model"))
        rates[name]["vllm"] = _rate(engine, _prompts(target))
        engine.close()
        print(f"{name:8s} vllm {rates[name]['vllm']:.0f} tokens/s")


def _prompts(folder: Path) -> list[str]:
    from morlaif_ray.artifacts import read_records
    from morlaif_ray.types import Prompt

    return [p.text for p in read_records(folder / "0_sft" / "prompts.parquet", Prompt)]


def _rate(engine: Any, prompts: list[str]) -> float:
    """Median tokens per second of three batches after a short warm-up."""
    settings = SamplingSettings(max_new_tokens=NEW_TOKENS)
    engine.generate([GenerationRequest(prompts[0], 0)], SamplingSettings(max_new_tokens=4))
    rates = []
    for index in range(ROUNDS):
        chosen = [prompts[(index * BATCH + row) % NUM_PROMPTS] for row in range(BATCH)]
        requests = [GenerationRequest(p, 1000 * index + row) for row, p in enumerate(chosen)]
        started = time.perf_counter()
        batch: RolloutBatch = engine.generate(requests, settings)
        rates.append(float(batch.response_lengths_B.sum()) / (time.perf_counter() - started))
    return sorted(rates)[ROUNDS // 2]


@torch.no_grad()
def _generate_rate(model_folder: Path, folder: Path) -> float:
    """`model.generate` as its documentation says: left padding, one batch, sampling; real tokens per second."""
    from morlaif_ray.backbone import load_causal_lm, load_tokenizer

    model = load_causal_lm(str(model_folder)).eval()
    tokenizer = load_tokenizer(str(model_folder))
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    rates = []
    for index in range(ROUNDS):
        torch.manual_seed(index)
        rows = [prompts[(index * BATCH + row) % NUM_PROMPTS] for row in range(BATCH)]
        longest = max(map(len, rows))
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        started = time.perf_counter()
        output = model.generate(
            input_ids=ids,
            attention_mask=(ids != pad).long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=pad,
        )
        seconds = time.perf_counter() - started
        rates.append(float((output[:, longest:] != pad).sum()) / seconds)
    return sorted(rates)[ROUNDS // 2]
