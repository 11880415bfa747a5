"""RewardBench's format: three shapes of rows, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from morlaif_ray.data.rewardbench import read_rewardbench
from morlaif_ray.errors import DataError

pytestmark = pytest.mark.unit

PLAIN = {
    "prompt": "What is red?",
    "chosen": "A colour.",
    "rejected": "No.",
    "subset": "easy",
    "id": 7,
}
CHAT = {
    "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go"}],
    "subset": "chat",
}
HH = {
    "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
    "rejected": "\n\nHuman: Why?\n\nAssistant: Because",
}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_responses_messages_and_dialogues_become_the_same_kind_of_pair(tmp_path: Path) -> None:
    same = {**PLAIN, "rejected": "A colour. "}
    found = read_rewardbench(write(tmp_path / "x.jsonl", [PLAIN, CHAT, HH, same]))
    assert [(p.subset, p.prompt, p.chosen, p.rejected) for p in found.pairs] == [
        ("easy", "\n\nHuman: What is red?\n\nAssistant:", " A colour.", " No."),
        ("chat", "\n\nHuman: Hi\n\nAssistant:", " Hello", " Go"),
        ("all rows", "\n\nHuman: Why?\n\nAssistant:", " So.", " Because"),
    ]
    assert found.num_identical == 1


def test_parquet_gives_the_same_pairs(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([PLAIN, PLAIN]), tmp_path / "x.parquet")
    lines = read_rewardbench(write(tmp_path / "x.jsonl", [PLAIN, PLAIN]))
    assert read_rewardbench(str(tmp_path / "x.parquet")) == lines


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**PLAIN, "rejected": None},
            r"line 2: 'rejected' must be text, but is missing; mend or drop",
        ),
        ({**PLAIN, "chosen": " "}, r"line 2: the response in 'chosen' is empty"),
        ({**PLAIN, "subset": 3}, r"line 2: 'subset' must be text, not int"),
        (["a"], r"line 2: must be an object with keys, not list"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rewardbench(write(tmp_path / "x.jsonl", [PLAIN, row]))


def test_a_missing_file_and_a_file_without_pairs_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_rewardbench(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="no pair with two different responses"):
        read_rewardbench(write(tmp_path / "x.jsonl", [{**PLAIN, "rejected": "A colour."}]))
