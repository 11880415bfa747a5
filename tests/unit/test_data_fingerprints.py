"""Stage 0 knows the data files by content, not by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.train_sft import data_fingerprints
from morlaif_ray.config import parse_config

pytestmark = pytest.mark.unit


def test_a_file_that_changed_under_its_name_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    config = parse_config(
        {
            "data": {"source": {"kind": "files", "paths": [str(tmp_path)]}},
            "evaluation": {"judge": "training"},
        },
        "test",
    )
    path.write_text("one", encoding="utf-8")
    before = data_fingerprints(config)
    path.write_text("two", encoding="utf-8")
    after = data_fingerprints(config)
    assert list(before) == list(after) == ["pairs.jsonl"]
    assert before != after


def test_the_test_bed_has_no_files() -> None:
    assert data_fingerprints(parse_config({}, "test")) == {}
