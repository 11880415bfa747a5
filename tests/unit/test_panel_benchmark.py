"""The panel benchmark's own arithmetic."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.panel import LIMITS, MEANINGS, _parse, hh_texts, in_turns
from benchmarks.panel_accuracy import interval
from benchmarks.panel_pooling import measure_pooling

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def test_everything_runs_in_turns_after_one_warm_up() -> None:
    seen: list[str] = []
    spent = in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert seen == ["a", "b"] * 3
    assert set(spent.cpu_s) == set(spent.wall_s) == {"a", "b"}


def test_an_accuracy_is_the_mean_over_principles_whatever_their_missing_pairs() -> None:
    hits = np.array([[1.0, np.nan], [1.0, 0.0], [0.0, np.nan], [0.0, 0.0]])
    value, low, high = interval(hits, 200)
    assert value == pytest.approx((0.5 + 0.0) / 2)
    assert low <= value <= high


def test_both_sides_of_every_dialogue_are_read(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        for name in "xy":
            lines.write(json.dumps({"chosen": f"{name}1", "rejected": f"{name}2"}) + "\n")
    assert hh_texts(path) == ["x1", "x2", "y1", "y2"]


def test_parts_are_named_with_spaces_or_commas(capsys: pytest.CaptureFixture[str]) -> None:
    assert _parse(["--only", "costs", "lengths"]).only == ["costs", "lengths"]
    assert _parse(["--only", "costs,pooling"]).only == ["costs", "pooling"]
    assert _parse([]).only == ["costs", "lengths", "pooling", "accuracy"]
    with pytest.raises(SystemExit):
        _parse(["--only", "cost"])
    assert "--only: no part 'cost'; write some of costs, lengths" in capsys.readouterr().err


def test_every_figure_with_a_limit_says_what_it_is_relative_to() -> None:
    assert set(LIMITS) <= set(MEANINGS)


def test_without_vllm_pooling_has_no_figure_and_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = measure_pooling(tmp_path, argparse.Namespace(repetitions=1, quick=True))
    assert found["pooling_speedup"] is None
    assert found["pooling_max_abs_diff"] is None
    assert "vLLM is not installed" in found["pooling_absent"]
