"""What an arm leaves on disk: a log that survives a kill, seconds beside it, and in the end metrics and summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jobs.context import JobContext
from morlaif_ray.artifacts import explain_os_errors, write_json, write_table
from morlaif_ray.config.learning import ArmConfig
from morlaif_ray.errors import ArtifactError
from morlaif_ray.types import FloatArray

METRICS_LOG = "metrics.jsonl"


class ArmRecord:
    """One row per step of one arm. The rows are on disk alone: however long the run, this holds none of them."""

    def __init__(self, context: JobContext, config: ArmConfig, work: Path, num_steps: int) -> None:
        self._config = config
        self._work = work
        self._num_steps = num_steps
        self._num_samples = num_steps * context.config.policy.batch_size
        self._seconds = context.path("timings", f"policy-{config.name}.jsonl")

    def add(self, step: int, metrics: Mapping[str, float], observed: Mapping[str, float]) -> None:
        """Adds a row. What differs from run to run (`observed`: seconds, gauges) goes elsewhere."""
        row = {"step": float(step), **metrics}
        self._seconds.parent.mkdir(exist_ok=True)
        with self._seconds.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **observed}) + "\n")
        with (self._work / METRICS_LOG).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def go_back(self, step: int) -> None:
        """Forgets the rows after `step`: those steps will be run again."""
        log = self._work / METRICS_LOG
        rows = [row for row in _read_log(log) if row["step"] <= step]
        # Beside the log and then over it: a kill or a full disk in between must not cost the rows.
        partial = log.with_suffix(".partial")
        with explain_os_errors(log):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            partial.write_text(text, encoding="utf-8")
            partial.replace(log)

    def publish(self, sft_reward: FloatArray) -> dict[str, Any]:
        """Writes `metrics.parquet` and `summary.json` and returns the latter; `sft_reward` gives its unit.

        ArtifactError where the log lacks a step: a curve with a gap is not published.
        """
        rows = _read_log(self._work / METRICS_LOG)
        steps = [int(row["step"]) for row in rows]
        if steps != list(range(1, self._num_steps + 1)):
            missing = sorted(set(range(1, self._num_steps + 1)) - set(steps))
            gap = f"no row of step {missing[0]}" if missing else "a step has two rows"
            raise ArtifactError(
                f"{self._work / METRICS_LOG}: {gap}; remove {self._work} to begin this arm again"
            )
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["step"] = [int(step) for step in columns["step"]]
        write_table(self._work / "metrics.parquet", columns)
        summary = self._summary(rows, sft_reward)
        write_json(self._work / "summary.json", summary)
        return summary

    def _summary(self, rows: list[dict[str, float]], sft_reward: FloatArray) -> dict[str, Any]:
        last = rows[-max(5, len(rows) // 10) :]
        final = float(np.mean([row["reward_mean"] for row in last]))
        mean, std = float(sft_reward.mean()), float(sft_reward.std(ddof=1))
        return {
            "arm": self._config.name,
            "scalarizer": self._config.scalarizer,
            "baseline": self._config.baseline,
            "num_steps": self._num_steps,
            "num_samples": self._num_samples,
            "sft_reward_mean": mean,
            "sft_reward_std": std,
            "final_reward_mean": final,
            "reward_gain_sd": (final - mean) / std,
            "final_kl": float(np.mean([row["kl_mean"] for row in last])),
        }


def _read_log(path: Path) -> list[dict[str, float]]:
    """Rows of the log; a half-written last line is dropped, its step will be run again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
