"""vLLM beside `transformers.generate` and our own sampler: response tokens per second of a rollout worker.

    python -m benchmarks.ppo --only engines [--quick]           # part of the PPO benchmark, float32
    python -m benchmarks.ppo_engines [--quick] [--dtype bfloat16]

Two workloads: `equal`, where EOS has no probability, so that every response fills its limit in every engine; `varying`,
lengths as in real dialogues. Each engine works in a process of its own, started with one thread as a rollout worker is,
on the same prompts: one untimed batch, then the median of `ROUNDS`, no prompt twice. `threads` is CPU time over wall
time of the timed batches; tokens per CPU second hold on a busy machine, too. Ours and vLLM also return
log-probabilities; `generate` does not. The default engine of a device should be the faster one. Last line: one JSON
object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ppo_workload import FULL, NUM_PROMPTS, QUICK, Size, make_workload

BATCH = 64
ROUNDS = 5
NEW_TOKENS = 64
IMPOSSIBLE = -30.0
"""EOS's logit beside words' around 0."""
ENGINES = ("ours", "transformers.generate", "vllm")
TIMEOUT_S = 1800.0


def compare_engines(
    folder: Path, size: Size, *, with_vllm: bool, dtype: str = "float32"
) -> dict[str, Any]:
    """Tokens per second of every engine; the ratio is for lengths that vary, None without vLLM."""
    measured: dict[str, dict[str, dict[str, float]]] = {}
    print(
        f"{'lengths':9s}{'engine':23s}{'tokens/s':>9s}{'threads':>9s}{'tokens/CPU s':>14s}{'tokens each':>13s}"
    )
    for name, mean in (("equal", None), ("varying", 48.0)):
        target = folder / name
        target.mkdir(parents=True)
        make_workload(target, size, topology="shared_trunk", mean_response_tokens=mean, dtype=dtype)
        if mean is None:
            _make_endless(target / "0_sft" / "model", dtype)
        measured[name] = {}
        for engine in ENGINES if with_vllm else ENGINES[:2]:
            row = measured[name][engine] = _in_own_process(engine, target, dtype)
            print(
                f"{name:9s}{engine:23s}{row['tokens_per_s']:9.0f}{row['threads']:9.2f}"
                f"{row['tokens_per_cpu_s']:14.0f}{row['tokens_each']:13.1f}",
                flush=True,
            )
    rates = {
        name: {engine: round(row["tokens_per_s"]) for engine, row in rows.items()}
        for name, rows in measured.items()
    }
    ratio = None
    if with_vllm:
        varying = measured["varying"]
        ratio = varying["vllm"]["tokens_per_s"] / varying["transformers.generate"]["tokens_per_s"]
        print(_verdict(rates["varying"]))
    return {
        "rollout_ratio_vllm_vs_generate": None if ratio is None else round(ratio, 2),
        "rollout_tokens_per_s": rates,
    }


def _verdict(rates: dict[str, int]) -> str:
    """The faster of the two engines that `policy.engine` knows, here."""
    ours = {"transformers": rates["ours"], "vllm": rates["vllm"]}
    slower, faster = sorted(ours, key=lambda engine: ours[engine])
    device = "a GPU" if torch.cuda.is_available() else "a CPU"
    return f"policy.engine on {device}: {faster} is {ours[faster] / ours[slower]:.2f} times as fast as {slower}"


def _make_endless(model_folder: Path, dtype: str) -> None:
    """Points the final layer norm's bias away from EOS's embedding."""
    from morlaif_ray.backbone import load_causal_lm

    model = load_causal_lm(str(model_folder), dtype=dtype)
    with torch.no_grad():
        eos = model.transformer.wte.weight[model.config.eos_token_id].float()
        model.transformer.ln_f.bias.copy_(IMPOSSIBLE * eos / eos.square().sum())
    model.save_pretrained(model_folder)


def _in_own_process(engine: str, folder: Path, dtype: str) -> dict[str, float]:
    """Starts the engine as a rollout worker's process is started: one OpenMP thread from the beginning."""
    command = [sys.executable, "-m", "benchmarks.ppo_engines", "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if engine == "vllm":
        from morlaif_ray.vllm_environment import CPU_ENVIRONMENT, ENVIRONMENT

        environment |= ENVIRONMENT | ({} if torch.cuda.is_available() else CPU_ENVIRONMENT)
    done = subprocess.run(
        [*command, "--engine", engine, "--dtype", dtype],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"{engine} ended with exit code {done.returncode}:\n{tail}")
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


# ---------------------------------------------------------------- inside the process of one engine


def measure(engine: str, folder: Path, dtype: str) -> dict[str, float]:
    """Of the timed batches: medians of tokens per second, per CPU second, CPU seconds per second; mean length."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    sample = {"ours": _ours, "transformers.generate": _generate, "vllm": _vllm}[engine](
        folder, dtype
    )
    sample(ROUNDS)  # other prompts than those of the timed batches
    rates, shares, per_cpu, tokens = [], [], [], 0
    for index in range(ROUNDS):
        started, cpu = time.perf_counter(), time.process_time()
        made = sample(index)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        rates.append(made / seconds)
        shares.append(cpu / seconds)
        per_cpu.append(made / cpu)
        tokens += made
    return {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_cpu_s": statistics.median(per_cpu),
        "tokens_each": tokens / ROUNDS / BATCH,
        "threads": statistics.median(shares),
    }


def _rows(index: int) -> list[int]:
    assert (index + 1) * BATCH <= NUM_PROMPTS
    return list(range(index * BATCH, (index + 1) * BATCH))


def _ours(folder: Path, dtype: str) -> Callable[[int], int]:
    from morlaif_ray.rl.generation import TransformersEngine

    engine = TransformersEngine.from_path(folder / "0_sft" / "model", dtype=dtype)
    if torch.cuda.is_available():
        engine.model.to("cuda")
    return _engine(engine, folder)


def _vllm(folder: Path, dtype: str) -> Callable[[int], int]:
    from morlaif_ray.rl.vllm_engine import VllmEngine

    return _engine(VllmEngine(folder / "0_sft" / "model", dtype=dtype), folder)


def _engine(engine: Any, folder: Path) -> Callable[[int], int]:
    from morlaif_ray.artifacts import read_records
    from morlaif_ray.rl.generation import SamplingSettings
    from morlaif_ray.types import GenerationRequest, Prompt

    prompts = [p.text for p in read_records(folder / "0_sft" / "prompts.parquet", Prompt)]
    settings = SamplingSettings(max_new_tokens=NEW_TOKENS)

    def sample(index: int) -> int:
        requests = [GenerationRequest(prompts[row], row) for row in _rows(index)]
        return int(engine.generate(requests, settings).response_lengths_B.sum())

    return sample


def _generate(folder: Path, dtype: str) -> Callable[[int], int]:
    """`model.generate` as its documentation says: left padding, one batch, sampling; real tokens count."""
    from morlaif_ray.backbone import load_causal_lm, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(str(folder / "0_sft" / "model"), dtype=dtype).to(device).eval()
    pad = load_tokenizer(str(folder / "0_sft" / "model")).pad_token_id
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))

    @torch.no_grad()
    def sample(index: int) -> int:
        torch.manual_seed(index)
        rows = [prompts[row] for row in _rows(index)]
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
        output = model.generate(
            input_ids=ids,
            attention_mask=(ids != pad).long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=pad,
        )
        return int((output[:, longest:] != pad).sum())

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1.8M parameters instead of 29M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measure(options.engine, options.folder, options.dtype)), flush=True)
        # Results are out; vLLM's threads must not hold up the exit.
        os._exit(0)
    with_vllm = importlib.util.find_spec("vllm") is not None
    if not with_vllm:
        print("vLLM is not installed here; 'make test-vllm' installs its CPU build")
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="morlaif-engines-") as scratch:
        figures = compare_engines(Path(scratch), size, with_vllm=with_vllm, dtype=options.dtype)
    figures |= {"dtype": options.dtype, "model_parameters": size.parameters}
    print(json.dumps(figures | {"load_at_end": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
