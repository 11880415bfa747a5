"""Reward against KL on the test-bed: ours synchronous, ours one step off, and trl 1.12, three seeds each.

    python -m benchmarks.ppo_quality --run-dir runs/demo [--steps 60] [--seeds 0 1 2] [--peers .venv-peers]
                                    [--csv FILE] [--plot FILE]

Takes SFT model, preference models and weights from a finished run. All train the same policy on the same linear reward
with a critic of their own, the same learning rate, epochs and a fixed KL coefficient; no reward scaling. What a run
reaches is read at equal KL: the reward is interpolated on a grid of KL that all runs reach, and the seeds give a mean
and a 95% interval (Student's t). Curves agree where the intervals overlap. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from actors.session import prepare_environment
from benchmarks.ppo_sides import ROOT, OurSide, PeerSide
from benchmarks.ppo_workload import SETTINGS, TINY, Workload
from morlaif_ray.artifacts import read_json, read_records, write_json
from morlaif_ray.backbone import encode_prompt, load_tokenizer
from morlaif_ray.config import Config, load_config
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.types import Prompt

STAGES = ("0_sft", "3_preference_models", "4_reward")
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t by number of seeds."""
SHARED: dict[str, Any] = {
    "learning_rate": 1e-4,
    "num_epochs": 2,
    "batch_size": 64,
    "microbatch_size": 64,
    "kl_coefficient": 0.2,
    "value_coefficient": 1.0,
}
Curve = list[tuple[float, float]]
"""(KL in nats per response, mean reward) per step."""


def main() -> None:
    options = _options()
    prepare_environment()
    methods: dict[str, dict[str, Any] | None] = {"synchronous": {}}
    if "staleness" in PolicyConfig.model_fields:
        methods["one step off"] = {"staleness": 1, "importance_cap": 2.0}
    else:
        print("one step off did not run: this version has no policy.staleness")
    if (options.peers / "bin" / "python").exists():
        methods["trl 1.12"] = None
    else:
        print(f"trl 1.12 did not run: no environment at {options.peers}; run 'make bench-peers'")
    curves: dict[str, list[Curve]] = {}
    for seed in options.seeds:
        for name, changes in methods.items():
            with tempfile.TemporaryDirectory(prefix="morlaif-quality-") as scratch:
                folder = Path(scratch) / "run"
                workload = workload_of(options, folder, seed, changes or {})
                curve = (
                    peer_curve(workload, options, seed)
                    if changes is None
                    else our_curve(workload, options.steps)
                )
            curves.setdefault(name, []).append(curve)
            print(
                f"seed {seed} {name}: reward {curve[0][1]:+.2f} -> {curve[-1][1]:+.2f} at KL {curve[-1][0]:.2f}",
                flush=True,
            )
    if options.csv:
        write_curves(options.csv, options.seeds, curves)
    if options.plot:
        plot_curves(options.plot, curves)
    print(json.dumps(compare(curves)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--csv", type=Path, help="all curves, one row per step")
    parser.add_argument("--plot", type=Path, help="picture (PNG) of all curves")
    return parser.parse_args()


def workload_of(
    options: argparse.Namespace, folder: Path, seed: int, changes: dict[str, Any]
) -> Workload:
    """A copy of the run's stages before PPO with this seed, which also holds what the peer reads."""
    source = options.run_dir.absolute()
    for stage in STAGES:
        shutil.copytree(source / stage, folder / stage)
    config = _config(source, seed, options.steps, changes)
    (folder / "policy").symlink_to("0_sft/model")
    card = read_json(folder / "3_preference_models" / "panel.json")
    for entry in card["models"].values():
        entry["folder"] = f"3_preference_models/{entry['folder']}"
    write_json(folder / "panel.json", card)
    shutil.copy2(folder / "4_reward" / "weights.json", folder / "weights.json")
    tokenizer = load_tokenizer(str(folder / "0_sft" / "model"))
    prompts = read_records(folder / "0_sft" / "prompts.parquet", Prompt)
    rows = [encode_prompt(tokenizer, p.text, 1 << 20) for p in prompts if p.split == "policy"]
    write_json(folder / "prompts.json", rows)
    return Workload(folder, TINY, config, None)


def _config(source: Path, seed: int, steps: int, changes: dict[str, Any]) -> Config:
    config = load_config(source / "config.yaml", [])
    known = {k: v for k, v in changes.items() if k in PolicyConfig.model_fields}
    policy = config.policy.model_dump() | {
        **SHARED,
        "arms": [{"name": "ours", "scalarizer": "linear"}],
        "num_minibatches": 1,
        "separate_critic": True,
        "adaptive_kl": False,
        "scale_reward": False,
        "reward_clip": 1e6,
        "warmup_steps": 0,
        "num_steps": steps + 1,
        "checkpoint_every": 1_000_000,
        **known,
    }
    return config.model_copy(
        update={
            "seed": seed,
            "policy": PolicyConfig.model_validate(policy),
            "tracking": config.tracking.model_copy(update={"tracker": "none"}),
        }
    )


def our_curve(workload: Workload, steps: int) -> Curve:
    """Reward and KL of every step, from the arm's own log."""
    side = OurSide(workload)
    try:
        for _ in range(steps):
            side.step()
        log = side.arm.work / "metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    finally:
        side.close()
    return [(row["kl_mean"], row["reward_mean"]) for row in rows]


def peer_curve(workload: Workload, options: argparse.Namespace, seed: int) -> Curve:
    settings = {
        **SETTINGS,
        **SHARED,
        "max_new_tokens": workload.config.policy.max_new_tokens,
        "max_steps": options.steps + 1,
        "seed": seed,
    }
    side = PeerSide(options.peers.absolute() / "bin" / "python", workload, settings)
    curve: Curve = []
    try:
        for _ in range(options.steps):
            answer = side.step()
            curve.append((float(answer["kl"]), float(answer["reward"])))
    finally:
        side.close()
    return curve


def compare(curves: dict[str, list[Curve]], num_points: int = 5) -> dict[str, Any]:
    """Reward at equal KL with intervals over seeds, printed as a table, and whether they overlap everywhere."""
    reached = min(max(kl for kl, _ in curve) for runs in curves.values() for curve in runs)
    grid = np.linspace(0.2 * reached, 0.9 * reached, num_points)
    intervals: dict[str, list[tuple[float, float]]] = {}
    print(f"\n{'KL':>16s}" + "".join(f"{kl:>20.2f}" for kl in grid))
    for name, runs in curves.items():
        rewards = np.array([_reward_at(curve, grid) for curve in runs])
        mean = rewards.mean(axis=0)
        half = np.zeros(num_points)
        if len(runs) > 1:
            half = T_95.get(len(runs), 2.5) * rewards.std(axis=0, ddof=1) / len(runs) ** 0.5
        intervals[name] = [(m - h, m + h) for m, h in zip(mean, half, strict=True)]
        shown = (f"{m:+.2f} +- {h:.2f}" for m, h in zip(mean, half, strict=True))
        print(f"{name:>16s}" + "".join(f"{text:>20s}" for text in shown))
    overlap = all(
        max(bounds[i][0] for bounds in intervals.values())
        <= min(bounds[i][1] for bounds in intervals.values())
        for i in range(num_points)
    )
    return {
        "kl": [round(float(kl), 3) for kl in grid],
        "intervals": {
            name: [[round(float(x), 3) for x in pair] for pair in bounds]
            for name, bounds in intervals.items()
        },
        "intervals_overlap": overlap,
        "seeds": {name: len(runs) for name, runs in curves.items()},
    }


def _reward_at(curve: Curve, grid: Any) -> Any:
    """Reward by KL: both smoothed over five steps, then interpolated along the rising KL."""
    kl, reward = _smoothed(curve)
    order = np.argsort(kl)
    return np.interp(grid, kl[order], reward[order])


def _smoothed(curve: Curve) -> tuple[Any, Any]:
    """(KL, reward), each the mean of five steps."""
    values = np.array(curve)
    kernel = np.ones(min(5, len(values))) / min(5, len(values))
    return tuple(np.convolve(values[:, i], kernel, mode="valid") for i in (0, 1))


def write_curves(path: Path, seeds: list[int], curves: dict[str, list[Curve]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("method", "seed", "step", "kl", "reward"))
        for name, runs in curves.items():
            for seed, curve in zip(seeds, runs, strict=True):
                for step, (kl, reward) in enumerate(curve, 1):
                    writer.writerow((name, seed, step, f"{kl:.5f}", f"{reward:.5f}"))


def plot_curves(path: Path, curves: dict[str, list[Curve]]) -> None:
    """One thin line per seed, smoothed over five steps as the comparison is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for index, (name, runs) in enumerate(curves.items()):
        for number, curve in enumerate(runs):
            kl, reward = _smoothed(curve)
            label = name if number == 0 else None
            axes.plot(kl, reward, color=f"C{index}", linewidth=1.2, alpha=0.8, label=label)
    axes.set_xlabel("KL to the SFT model, nats per response")
    axes.set_ylabel("mean reward, SFT standard deviations")
    axes.set_title("Reward against KL on the test-bed, one line per seed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
