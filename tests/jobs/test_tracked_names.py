"""What a finished run recorded, `jobs/metric_names.py` and the Grafana dashboard speak of the same figures."""

from __future__ import annotations

import json
import re

import pytest

from jobs.metric_names import GAUGES, SECONDS, is_known
from morlaif_ray.artifacts import read_table
from morlaif_ray.principles import load_principles
from tests.jobs.commands import ROOT, FinishedRun

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(2400)]


def recorded(finished_run: FinishedRun) -> set[str]:
    """Names of every step's row, of results and of seconds, without the step itself."""
    run_dir = finished_run.run_dir
    names = set(read_table(run_dir / "5_policy" / "linear" / "metrics.parquet"))
    rows = (run_dir / "timings" / "policy-linear.jsonl").read_text().splitlines()
    return (names | set(json.loads(rows[-1]))) - {"step"}


def test_every_recorded_figure_has_a_name_with_a_unit(finished_run: FinishedRun) -> None:
    principles = tuple(principle.name for principle in load_principles())
    names = recorded(finished_run)
    assert [name for name in sorted(names) if not is_known(name, principles)] == []


def test_the_dashboard_shows_figures_that_this_run_recorded(finished_run: FinishedRun) -> None:
    text = (ROOT / "docs" / "grafana" / "morlaif.json").read_text()
    shown = {name for name in re.findall(r"ray_morlaif_([a-z0-9_]+)", text) if name[-1] != "_"}
    # Some figures are of modes that the smallest run does not use.
    assert shown - recorded(finished_run) - set(GAUGES) - set(SECONDS) == set()
    assert {"seconds_generate", "seconds_update", "reward_mean"} <= shown & recorded(finished_run)
