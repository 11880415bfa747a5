"""The demo as a newcomer meets it: wall time, peak memory, time to the first line, and what the method reached.

    python -m benchmarks.demo [--config configs/demo.yaml] [--keep DIR]

Runs `morlaif --help` five times (median) and the demo once in a fresh folder. Memory is the sum of the proportional set
sizes of the driver and all its descendants (shared pages counted once), sampled every half second. The figures of the
method come from the run's own tables. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

SAMPLE_INTERVAL_S = 0.5
NUM_HELP_RUNS = 5
LIMITS = {"demo_wall_s": 480.0, "peak_memory_gb": 8.0, "first_line_s": 5.0, "help_s": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--keep", type=Path, help="keep the run folder here")
    options = parser.parse_args()
    figures: dict[str, Any] = {"help_s": _help_seconds()}
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = (options.keep or Path(scratch) / "demo").absolute()
        figures |= _run_demo(options.config, run_dir)
        figures |= _method_figures(run_dir)
    figures["machine"] = (
        f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}"
    )
    for name, value in figures.items():
        limit = f"   (limit {LIMITS[name]:g})" if name in LIMITS else ""
        print(f"{name:34s} {value}{limit}")
    print(json.dumps(figures))


def _help_seconds() -> float:
    seconds = []
    for _ in range(NUM_HELP_RUNS):
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "jobs", "--help"], check=True, stdout=subprocess.DEVNULL
        )
        seconds.append(time.monotonic() - started)
    return round(statistics.median(seconds), 3)


def _run_demo(config: str, run_dir: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs", "run", "--config", config, "--run-dir", str(run_dir)]
    started = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    peak = _PeakMemory(process.pid)
    first_line_s = None
    assert process.stderr is not None
    for line in process.stderr:
        if first_line_s is None:
            first_line_s = time.monotonic() - started
        print(line.rstrip(), flush=True)
    if process.wait() != 0:
        raise SystemExit(f"the demo ended with exit code {process.returncode}")
    wall_s = time.monotonic() - started
    return {
        "demo_wall_s": round(wall_s, 1),
        "first_line_s": round(first_line_s or wall_s, 2),
        "peak_memory_gb": round(peak.stop() / 1e9, 2),
        "stages_s": json.loads((run_dir / "timings.json").read_text(encoding="utf-8")),
    }


class _PeakMemory:
    """Samples the memory of a process tree until stopped."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._done.wait(SAMPLE_INTERVAL_S):
            self._peak = max(self._peak, self._total())

    def _total(self) -> int:
        total = 0
        try:
            tree = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return 0
        for process in tree:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # it ended between the two calls
                continue
        return total

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak


def _method_figures(run_dir: Path) -> dict[str, Any]:
    accuracy = {row["name"]: row for row in _rows(run_dir / "4_reward/scalarizers.csv")}
    wins = {(r["policy"], r["opponent"]): r for r in _rows(run_dir / "6_evaluation/win_rates.csv")}
    gates = json.loads((run_dir / "6_evaluation/gates.json").read_text(encoding="utf-8"))
    linear = json.loads((run_dir / "5_policy/linear/summary.json").read_text(encoding="utf-8"))

    def shown(row: dict[str, str], key: str) -> str:
        return f"{float(row[key]):.3f} [{float(row['low']):.3f}, {float(row['high']):.3f}]"

    return {
        "accuracy_linear": shown(accuracy["linear"], "accuracy"),
        "accuracy_random_principle": shown(accuracy["random_principle"], "accuracy"),
        "win_rate_linear_vs_sft": shown(wins[("linear", "sft")], "win_rate"),
        "reward_gain_sd": round(linear["reward_gain_sd"], 2),
        "final_kl": round(linear["final_kl"], 2),
        "claims_that_hold": f"{sum(gate['holds'] for gate in gates)} of {len(gates)}",
    }


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


if __name__ == "__main__":
    main()
