"""From responses and scores to evidence: statistics, win rates, claims, figures and the report.

    win_rate(ab, ba) -> WinRate          mean_interval(values) -> Interval
    all_gates(read_run(...)) -> claims   build_report(run_dir, evaluation_dir, output_dir) -> report.html

Contract: reads files and arrays, never a model. Imports neither torch nor ray; matplotlib only when figures are drawn.
"""

from morlaif_ray.evaluation.claims import all_gates
from morlaif_ray.evaluation.gates import verdict
from morlaif_ray.evaluation.report import REPORT_FILE, build_report
from morlaif_ray.evaluation.run_tables import RunTables, read_run
from morlaif_ray.evaluation.statistics import (
    LengthStatistics,
    length_statistics,
    mean_interval,
    paired_difference,
    pearson,
)
from morlaif_ray.evaluation.winrate import WinRate, outcome_points, win_rate

__all__ = [
    "REPORT_FILE",
    "LengthStatistics",
    "RunTables",
    "WinRate",
    "all_gates",
    "build_report",
    "length_statistics",
    "mean_interval",
    "outcome_points",
    "paired_difference",
    "pearson",
    "read_run",
    "verdict",
    "win_rate",
]
