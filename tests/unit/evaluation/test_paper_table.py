"""The run beside the paper's Figures 2a and 2b: our values by model, and no invented ones of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from morlaif_ray.config import parse_config
from morlaif_ray.evaluation.report.blocks import Notice, Table
from morlaif_ray.evaluation.report.paper import NOT_AT_HAND, model_in_words, paper_section
from morlaif_ray.evaluation.run_tables import RunTables

pytestmark = pytest.mark.unit


def tables(**changed: Any) -> RunTables:
    config = parse_config({"name": "mine", "preference": {"backbone": "/data/models/mini"}}, "mine")
    return RunTables(Path("run"), config, {}, (), **changed)


def row(accuracy: float, **names: str) -> dict[str, Any]:
    return {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "num": 50, **names}


def test_one_table_has_our_values_of_both_figures_by_model() -> None:
    section = paper_section(
        tables(
            pm_accuracy=[
                row(0.8, model="bias", kind="principle", label="judge"),
                row(0.6, model="bias", kind="principle", label="human"),
                row(0.7, model="baseline_random_principle", kind="baseline", label="judge"),
            ],
            scalarizers=[
                row(0.65, name="soft_max_min", kind="scalarizer"),
                row(0.9, name="judge_log_odds", kind="ceiling"),
            ],
        ),
        {},
    )
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    model = "mini; separate"
    assert table.cells == [
        ["2a", "bias", "principle", model, "0.800 [0.700, 0.900]", "50", NOT_AT_HAND],
        ["2a", "random principle", "baseline", model, "0.700 [0.600, 0.800]", "50", NOT_AT_HAND],
        ["2b", "soft max-min", "scalarizer", model, "0.650 [0.550, 0.750]", "50", NOT_AT_HAND],
    ]


def test_without_the_stages_a_sentence_stands_there() -> None:
    (notice,) = paper_section(tables(), {}).blocks
    assert isinstance(notice, Notice)
    assert "there is nothing to compare" in notice.text


@pytest.mark.parametrize(
    ("preference", "model", "words"),
    [
        ({}, {}, "GPT-2 of 3 x 96, trained on the spot; separate"),
        ({"backbone": "org/gpt2-medium"}, {}, "org/gpt2-medium; separate"),
        (
            {"topology": "adapters", "lora": {}},
            {"kind": "pretrained", "path": "../weights/llama/7b"},
            "7b; adapters, LoRA",
        ),
    ],
)
def test_a_model_is_named_without_folders_of_the_machine(
    preference: dict[str, Any], model: dict[str, Any], words: str
) -> None:
    config = {"name": "mine", "preference": preference, "model": model or {"kind": "scratch"}}
    assert model_in_words(parse_config(config, "mine")) == words
