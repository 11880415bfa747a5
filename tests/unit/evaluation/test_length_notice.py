"""A preference model that only measures length is visible in the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from morlaif_ray.evaluation.report.blocks import Notice, Table
from morlaif_ray.evaluation.report.learning import preference_section
from morlaif_ray.evaluation.run_tables import RunTables

pytestmark = pytest.mark.unit


def test_models_that_follow_length_are_named_once_with_the_share_of_variance() -> None:
    rows = [
        {"model": name, "kind": "principle", "label": label, "length_correlation": value}
        for name, value in (("detail", 0.9), ("bias", 0.3))
        for label in ("judge", "human")
    ]
    calibration = [{"model": "detail", "temperature": 1.5, "error_before": 0.1, "num": 10}]
    tables = RunTables(
        run_dir=Path("run"),
        config=None,
        manifests={},
        missing=(),
        pm_accuracy=rows,
        pm_calibration=calibration,
    )
    blocks = preference_section(tables, {}).blocks
    warnings = [b.text for b in blocks if isinstance(b, Notice) and b.tone == "warning"]
    assert len(warnings) == 1
    assert "correlation +0.90): length explains 81% of their variance" in warnings[0]
    (table,) = [b for b in blocks if isinstance(b, Table) and b.name == "pm_calibration"]
    assert [column.key for column in table.columns] == [
        "model",
        "temperature",
        "error_before",
        "num",
    ]
