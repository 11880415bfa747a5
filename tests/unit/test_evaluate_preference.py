"""`evaluate_preference` with a panel that counts words: the table, without Ray and without models."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import preference_panel
from jobs.context import JobContext
from jobs.evaluate_preference import run
from jobs.progress import Reporter
from morlaif_ray.artifacts import write_json
from morlaif_ray.config import Config
from morlaif_ray.errors import ArtifactError, DataError
from morlaif_ray.types import ScoreTable

pytestmark = pytest.mark.unit


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    return [
        {**row, "accuracy": float(row["accuracy"]), "num_pairs": int(row["num_pairs"])}
        for row in rows
    ]


class WordPanel:
    """`detail` likes long texts, `brevity` short ones."""

    def __init__(self, config: Config, columns: Sequence[Any], say: Any) -> None:
        self.columns = tuple(columns)

    def score(self, texts: Sequence[str]) -> ScoreTable:
        words = np.array([float(len(text.split())) for text in texts])
        sign = [1.0 if column.name == "detail" else -1.0 for column in self.columns]
        return ScoreTable(words[:, None] * np.array(sign), tuple(c.name for c in self.columns))

    def close(self) -> None: ...


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobContext:
    monkeypatch.setattr(preference_panel, "PreferencePanel", WordPanel)
    monkeypatch.setattr(JobContext, "connect", lambda self: None)
    entry = {"folder": "models/x", "head": 0}
    (tmp_path / "3_preference_models" / "models" / "x").mkdir(parents=True)
    write_json(tmp_path / "3_preference_models" / "models" / "x" / "preference_model.json", {})
    write_json(
        tmp_path / "3_preference_models" / "panel.json",
        {
            "principles": ["detail", "brevity"],
            "models": {"detail": entry, "brevity": entry},
            "baselines": {"human_labels": entry},
        },
    )
    return JobContext(Config(), tmp_path, Reporter(quiet=True))


def write_data(folder: Path) -> str:
    rows = [
        {"prompt": "p", "chosen": "one two three", "rejected": "one", "subset": "long"},
        {"prompt": "q", "chosen": "one", "rejected": "one two", "subset": "short"},
        {"prompt": "r", "chosen": "one", "rejected": "one two", "subset": "short"},
    ]
    path = folder / "my bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_table_holds_principles_baselines_rewards_and_the_length_control(
    context: JobContext, tmp_path: Path
) -> None:
    (tmp_path / "4_reward").mkdir()
    write_json(
        tmp_path / "4_reward" / "weights.json",
        {
            "principles": ["detail", "brevity"],
            "weights": {"detail": {"weight": 1.0}, "brevity": {"weight": -0.5}},
            "normaliser": {n: {"mean": 0.0, "std": 1.0, "num": 9} for n in ("detail", "brevity")},
        },
    )
    run(context, write_data(tmp_path), "filtered")
    rows = read_rows(tmp_path / "preference_evaluation" / "my_bench" / "accuracy.csv")
    found = {(row["subset"], row["model"]): row["accuracy"] for row in rows}
    assert found["long", "detail"] == found["short", "brevity"] == 1.0
    assert found["all", "detail"] == found["all", "linear"] == pytest.approx(1 / 3)
    assert found["all", "brevity"] == found["all", "baseline_human_labels"] == pytest.approx(2 / 3)
    assert found["all", "number_of_words"] == pytest.approx(1 / 3)
    assert len({model for _, model in found}) == 3 + 7 + 1


def test_without_weights_there_are_no_rewards(context: JobContext, tmp_path: Path) -> None:
    run(context, write_data(tmp_path), "filtered")
    rows = read_rows(tmp_path / "preference_evaluation" / "my_bench" / "accuracy.csv")
    assert {row["kind"] for row in rows} == {"principle", "baseline", "control"}


def test_bad_input_ends_before_a_model_is_loaded(
    context: JobContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preference_panel, "PreferencePanel", None)
    with pytest.raises(DataError, match="no such file"):
        run(context, str(tmp_path / "none.jsonl"), "filtered")
    (tmp_path / "3_preference_models" / "panel.json").unlink()
    with pytest.raises(ArtifactError, match=r"panel\.json: missing; run 'morlaif train_preference"):
        run(context, write_data(tmp_path), "filtered")
