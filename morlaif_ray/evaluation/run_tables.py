"""Reads what the stages of a run left on disk (schemas: `docs/artifacts.md`) for gates and report.

Contract: files only, read once, nothing written. A file or stage that is not there gives an empty table and is listed
in `missing`: a run may end before PPO, and real data has no truth columns. A damaged file is an ArtifactError. NaN is
missing; numbers are floats; the columns in `TEXT_COLUMNS` stay text even where they look like numbers.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from morlaif_ray.artifacts import STAGES, Manifest, read_json, read_manifest, read_table
from morlaif_ray.config import Config, load_config
from morlaif_ray.errors import ArtifactError
from morlaif_ray.types import FloatArray, Interval

EVALUATION = "6_evaluation"

Row = dict[str, Any]
Columns = dict[str, list[Any]]

TEXT_COLUMNS = frozenset(
    [
        "name",
        "kind",
        "model",
        "label",
        "policy",
        "opponent",
        "judge",
        "scalarizer",
        "baseline",
        "principle",
        "parameter",
        "trial",
        "other",
        "strategy",
    ]
)
READ_STAGES = tuple(sorted({*STAGES, "4_sweep"} - {EVALUATION}))
"""The stages that a report is made from, in the order of the pipeline."""
NAN = float("nan")
_SPELLED = {
    "sft": "SFT",
    "single_pm": "single PM",
    "soft_max_min": "soft max-min",
    "max_median": "max-median",
    "bernoulli_nash": "Bernoulli-Nash",
    "mean_log_odds": "mean log-odds",
}


@dataclass(frozen=True)
class ArmTables:
    """One trained policy: its summary and one row of metrics per PPO step."""

    name: str
    summary: Row
    metrics: Columns

    @property
    def is_baseline(self) -> bool:
        """True where the reward is a single PM."""
        return bool(self.summary.get("baseline"))

    @property
    def label(self) -> str:
        """Name for readers: the arm, and what it maximises where the name does not say it."""
        what = self.summary.get("baseline") or self.summary.get("scalarizer") or ""
        name = readable(self.name)
        return name if what in ("", self.name) else f"{name} ({readable(what)})"

    def series(self, column: str) -> FloatArray:
        """A metrics column as floats [steps]; all NaN where it is absent."""
        return floats(self.metrics.get(column), len(self.metrics.get("step", [])))

    @property
    def gain_series(self) -> FloatArray:
        """Mean reward of each step above SFT's, in SFT standard deviations."""
        mean, std = number(self.summary, "sft_reward_mean"), number(self.summary, "sft_reward_std")
        return (self.series("reward_mean") - mean) / (std if std > 0 else NAN)


@dataclass(frozen=True)
class RunTables:
    """Everything the report reads, by stage."""

    run_dir: Path
    config: Config | None
    manifests: dict[str, Manifest]
    missing: tuple[str, ...]
    """Paths relative to the run folder that are documented but were not there."""
    sft_metrics: Row = field(default_factory=dict)
    sft_training: list[Row] = field(default_factory=list)
    pair_metrics: Row = field(default_factory=dict)
    feedback: Row = field(default_factory=dict)
    agreement: list[Row] = field(default_factory=list)
    correlation: list[Row] = field(default_factory=list)
    matrix_intervals: list[Row] = field(default_factory=list)
    position_bias: list[Row] = field(default_factory=list)
    calibration: list[Row] = field(default_factory=list)
    learning_curve: list[Row] = field(default_factory=list)
    """Accuracy against the number of judged pairs, where `benchmarks.active_selection` left it in the run folder."""
    panel: Row = field(default_factory=dict)
    pm_training: list[Row] = field(default_factory=list)
    pm_accuracy: list[Row] = field(default_factory=list)
    pm_calibration: list[Row] = field(default_factory=list)
    weights: Row = field(default_factory=dict)
    scalarizers: list[Row] = field(default_factory=list)
    accuracy_difference: list[Row] = field(default_factory=list)
    ablation: list[Row] = field(default_factory=list)
    drop_one: list[Row] = field(default_factory=list)
    sweep_offline: list[Row] = field(default_factory=list)
    sweep_online: list[Row] = field(default_factory=list)
    sweep_best: Row = field(default_factory=dict)
    arms: tuple[ArmTables, ...] = ()
    policies: list[Row] = field(default_factory=list)
    win_rates: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    responses: Columns = field(default_factory=dict)

    @property
    def principles(self) -> tuple[str, ...]:
        """The K principles in panel order, from the earliest stage that names them."""
        names = self.panel.get("principles") or self.weights.get("principles")
        if names is None:
            found = self.feedback.get("by_principle", {})
            names = [name for name in found if name not in ("general", "random")]
        return tuple(names)

    @property
    def asked(self) -> dict[str, Row]:
        """Feedback figures per question: principles in panel order, then `general` and `random`."""
        found: dict[str, Row] = self.feedback.get("by_principle", {})
        order = [name for name in self.principles if name in found]
        return {name: found[name] for name in [*order, *(n for n in found if n not in order)]}

    @property
    def primary_arm(self) -> ArmTables | None:
        """The MORLAIF policy that claims are made of: `linear` where trained (the paper's), else the first."""
        arms = [arm for arm in self.arms if not arm.is_baseline]
        linear = [arm for arm in arms if arm.summary.get("scalarizer") == "linear"]
        return next(iter(linear or arms), None)

    @property
    def baseline_arm(self) -> ArmTables | None:
        """The single-PM policy: `random_principle` where trained (the paper's), else the first baseline."""
        arms = [arm for arm in self.arms if arm.is_baseline]
        paper = [arm for arm in arms if arm.summary["baseline"] == "random_principle"]
        return next(iter(paper or arms), None)

    @property
    def has_truth(self) -> bool:
        """True where the policies' responses were measured against the test-bed's truth."""
        return any(not math.isnan(number(row, "oracle_utility")) for row in self.policies)

    def policy(self, name: str) -> Row:
        return next((row for row in self.policies if row["policy"] == name), {})

    def win_row(self, policy: str, opponent: str) -> Row:
        """The comparison of two policies from the first one's side, mirrored where only the other was written."""
        for row in self.win_rates:
            if (row["policy"], row["opponent"]) == (policy, opponent):
                return row
        for row in self.win_rates:
            if (row["policy"], row["opponent"]) == (opponent, policy):
                return _mirrored(row)
        return {}

    @cached_property
    def by_prompt(self) -> dict[str, dict[str, int]]:
        """policy -> prompt_id -> row of `responses`."""
        index: dict[str, dict[str, int]] = {}
        pairs = zip(
            self.responses.get("policy", []), self.responses.get("prompt_id", []), strict=True
        )
        for position, (policy, prompt_id) in enumerate(pairs):
            index.setdefault(policy, {})[prompt_id] = position
        return index

    def paired(self, column: str, first: str, second: str) -> tuple[FloatArray, FloatArray]:
        """A column of `responses` for two policies over the prompts that both answered, in one order."""
        if column not in self.responses:
            return np.empty(0), np.empty(0)
        values = floats(self.responses[column], len(self.responses[column]))
        one, two = self.by_prompt.get(first, {}), self.by_prompt.get(second, {})
        prompts = [prompt for prompt in one if prompt in two]
        rows = np.array([[one[prompt], two[prompt]] for prompt in prompts], dtype=int).reshape(
            -1, 2
        )
        return values[rows[:, 0]], values[rows[:, 1]]


def read_run(run_dir: Path, evaluation_dir: Path) -> RunTables:
    """Reads stages 0 to 5 of `run_dir`, and the evaluation's files of `evaluation_dir`."""
    if not run_dir.is_dir():
        raise ArtifactError(
            f"{run_dir}: no such run folder; give --run-dir of a run that has begun"
        )
    reader = _Reader(run_dir, evaluation_dir)
    config_path = run_dir / "config.yaml"
    config = load_config(config_path) if config_path.is_file() else None
    if config is None:
        reader.missing.append("config.yaml")
    manifests = {stage: read_manifest(run_dir / stage) for stage in READ_STAGES}
    tables: dict[str, Any] = {
        "sft_metrics": reader.json("0_sft/metrics.json"),
        "sft_training": reader.csv("0_sft/training.csv"),
        "pair_metrics": reader.json("1_pairs/metrics.json"),
        "feedback": reader.json("2_feedback/summary.json"),
        "agreement": reader.csv("2_feedback/agreement.csv"),
        "correlation": reader.csv("2_feedback/correlation.csv"),
        "matrix_intervals": reader.csv("2_feedback/matrix_intervals.csv"),
        "position_bias": reader.csv("2_feedback/position_bias.csv"),
        "calibration": reader.csv("2_feedback/calibration.csv"),
        "learning_curve": reader.extra_csv("learning_curve.csv"),
        "panel": reader.json("3_preference_models/panel.json"),
        "pm_training": reader.csv("3_preference_models/training.csv"),
        "pm_accuracy": reader.csv("3_preference_models/accuracy.csv"),
        "pm_calibration": reader.extra_csv("3_preference_models/calibration.csv"),
        "weights": reader.json("4_reward/weights.json"),
        "scalarizers": reader.csv("4_reward/scalarizers.csv"),
        "accuracy_difference": reader.csv("4_reward/accuracy_difference.csv"),
        "ablation": reader.csv("4_reward/ablation.csv"),
        "drop_one": reader.csv("4_reward/drop_one.csv"),
        "sweep_offline": reader.csv("4_sweep/sweep_offline.csv"),
        "sweep_online": reader.csv("4_sweep/sweep_online.csv"),
        "sweep_best": reader.json("4_sweep/best.json"),
        "arms": reader.arms(config),
        "policies": reader.csv("6_evaluation/policies.csv"),
        "win_rates": reader.csv("6_evaluation/win_rates.csv"),
        "samples": reader.json("6_evaluation/samples.json") or [],
        "responses": reader.parquet("6_evaluation/responses.parquet"),
    }
    return RunTables(
        run_dir=run_dir,
        config=config,
        manifests={stage: found for stage, found in manifests.items() if found is not None},
        missing=tuple(reader.missing),
        **tables,
    )


class _Reader:
    """Reads documented files, and remembers the ones that are not there."""

    def __init__(self, run_dir: Path, evaluation_dir: Path) -> None:
        self.run_dir = run_dir
        self.evaluation_dir = evaluation_dir
        self.missing: list[str] = []

    def _path(self, relative: str) -> Path | None:
        stage, _, rest = relative.partition("/")
        path = self.evaluation_dir / rest if stage == EVALUATION else self.run_dir / relative
        if path.is_file():
            return path
        self.missing.append(relative)
        return None

    def json(self, relative: str) -> Any:
        path = self._path(relative)
        return {} if path is None else read_json(path)

    def csv(self, relative: str) -> list[Row]:
        path = self._path(relative)
        return [] if path is None else read_csv(path)

    def extra_csv(self, relative: str) -> list[Row]:
        """A table that a run need not have: its absence is not listed."""
        path = self.run_dir / relative
        return read_csv(path) if path.is_file() else []

    def parquet(self, relative: str) -> Columns:
        path = self._path(relative)
        return {} if path is None else read_table(path)

    def arms(self, config: Config | None) -> tuple[ArmTables, ...]:
        """Trained arms in the config's order; a configured arm that is not there is listed as missing."""
        folder = self.run_dir / "5_policy"
        trained = sorted(path.parent.name for path in folder.glob("*/summary.json"))
        wanted = [arm.name for arm in config.policy.arms] if config is not None else []
        names = [*wanted, *(name for name in trained if name not in wanted)]
        return tuple(
            ArmTables(
                name,
                self.json(f"5_policy/{name}/summary.json"),
                self.parquet(f"5_policy/{name}/metrics.parquet"),
            )
            for name in names
            if name in trained or self._path(f"5_policy/{name}/summary.json") is not None
        )


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV file: text columns as text, all others as floats, empty as NaN."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            raw = list(csv.DictReader(stream))
        return [{key: _cell(key, value) for key, value in row.items()} for row in raw]
    except (ValueError, csv.Error) as error:
        raise ArtifactError(f"{path}: not a readable table ({error})") from None


def readable(name: str) -> str:
    """`uncertainty_weighted` -> `uncertainty weighted`; the few names that spaces alone would garble are listed."""
    name = name.removeprefix("baseline_")
    return _SPELLED.get(name, name.replace("_", " "))


def number(row: Row, key: str) -> float:
    """A figure of a row; NaN where it is absent or null."""
    value = row.get(key)
    return NAN if value is None or value == "" else float(value)


def interval(
    row: Row, key: str, low: str = "low", high: str = "high", num: str = "num"
) -> Interval:
    """A figure with its interval; NaN and 0 where absent."""
    count = number(row, num)
    return Interval(
        number(row, key),
        number(row, low),
        number(row, high),
        0 if math.isnan(count) else int(count),
    )


def floats(values: list[Any] | None, length: int) -> FloatArray:
    """A column as floats [length]; null and an absent column become NaN."""
    if values is None:
        return np.full(length, NAN)
    return np.array([NAN if value is None else float(value) for value in values], dtype=np.float64)


def _cell(key: str, value: str | None) -> Any:
    if key in TEXT_COLUMNS:
        return value or ""
    return NAN if value is None or value == "" else float(value)


def _mirrored(row: Row) -> Row:
    return {
        **row,
        "policy": row["opponent"],
        "opponent": row["policy"],
        "win_rate": 1.0 - number(row, "win_rate"),
        "low": 1.0 - number(row, "high"),
        "high": 1.0 - number(row, "low"),
        "wins": row.get("losses"),
        "losses": row.get("wins"),
    }
