"""`morlaif evaluate_preference` on a finished run, as a person calls it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from morlaif_ray.artifacts import read_table
from tests.jobs.commands import Running

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(2400)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    return [
        {**row, "accuracy": float(row["accuracy"]), "num_pairs": int(row["num_pairs"])}
        for row in rows
    ]


def test_models_rewards_and_a_length_control_by_subset(run_copy: Path, tmp_path: Path) -> None:
    pairs = read_table(run_copy / "1_pairs" / "pairs.parquet")
    data = tmp_path / "bench.jsonl"
    rows = [
        {"prompt": prompt, "chosen": a, "rejected": b, "subset": f"part{i % 2}"}
        for i, (prompt, a, b) in enumerate(
            zip(pairs["prompt"], pairs["response_a"], pairs["response_b"], strict=True)
        )
        if a.strip() and b.strip()
    ][:40]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    running = Running(["evaluate_preference", "--run-dir", str(run_copy), "--data", str(data)])
    assert running.end() == 0, running.text
    found = read_rows(run_copy / "preference_evaluation" / "bench" / "accuracy.csv")
    assert {row["subset"] for row in found} == {"all", "part0", "part1"}
    whole = {row["model"]: row for row in found if row["subset"] == "all"}
    kinds = [row["kind"] for row in whole.values()]
    assert kinds.count("principle") == 12
    assert kinds.count("scalarizer") == 7
    assert "baseline_random_principle" in whole
    words = [
        (len(a.split()), len(b.split())) for a, b in ((r["chosen"], r["rejected"]) for r in rows)
    ]
    longer = sum(0.5 * ((a > b) + (a >= b)) for a, b in words) / len(words)
    assert whole["number_of_words"]["accuracy"] == pytest.approx(longer)
    assert whole["linear"]["num_pairs"] == 40


def test_a_run_without_models_and_data_without_a_file_end_in_one_line(
    run_copy: Path, tmp_path: Path
) -> None:
    missing = str(tmp_path / "none.jsonl")
    running = Running(["evaluate_preference", "--run-dir", str(run_copy), "--data", missing])
    assert running.end() == 2
    assert "none.jsonl: no such file" in running.lines[-1][1]
