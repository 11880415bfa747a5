"""Records and tables come back as they went in."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from morlaif_ray.artifacts import (
    read_json,
    read_records,
    read_table,
    write_csv,
    write_json,
    write_records,
    write_table,
)
from morlaif_ray.errors import ArtifactError
from morlaif_ray.types import Dialogue, GateReport, Interval, Judgement, Prompt, ResponsePair

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

NAN = float("nan")
UNICODE = '\n\nHuman: Grüße, 你好 🙂 \x00\t"quoted"\r\n\n\nAssistant:'


def equal(left: object, right: object) -> bool:
    """Equality under which NaN equals NaN."""
    return all(
        a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
        for a, b in zip(dataclasses.astuple(left), dataclasses.astuple(right), strict=True)  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(
    "record",
    [
        Prompt("id", UNICODE, "policy"),
        Dialogue("id", UNICODE, " ok"),
        ResponsePair("id", "p", UNICODE, " a", " b", "test", NAN),
        ResponsePair("id", "p", UNICODE, "", " b", "test", 1.0),
        Judgement("id", "detail", "unusable", NAN, NAN, "no A/B token", "rules"),
        Judgement("id", "detail", "ok", 0.1 + 0.2, -1e-300, "", "rules"),
        Interval(0.5, -math.inf, math.inf, 3),
        GateReport("claim", False, "evidence"),
    ],
)
def test_a_record_survives_the_disk_bit_for_bit(tmp_path: Path, record: object) -> None:
    path = tmp_path / "records.parquet"
    write_records(path, [record, record], type(record))
    back = read_records(path, type(record))
    assert len(back) == 2
    assert equal(back[0], record)
    assert type(back[0]) is type(record)


def test_no_records_are_an_empty_file_with_its_schema(tmp_path: Path) -> None:
    write_records(tmp_path / "x.parquet", [], Judgement)
    assert read_records(tmp_path / "x.parquet", Judgement) == []
    columns = [field.name for field in dataclasses.fields(Judgement)]
    assert list(read_table(tmp_path / "x.parquet")) == columns


def test_equal_records_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_records(tmp_path / name, [Prompt("1", UNICODE, "sft")], Prompt)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_table_keeps_nan_apart_from_null(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, {"x": np.array([1.5, NAN]), "y": [None, 2.0], "s": ["é", ""]})
    table = read_table(path)
    assert list(table) == ["x", "y", "s"]
    assert table["x"][0] == 1.5
    assert math.isnan(table["x"][1])
    assert table["y"] == [None, 2.0]
    assert table["s"] == ["é", ""]


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    message = "missing; run the stage that makes it first"
    with pytest.raises(ArtifactError, match=message):
        read_records(tmp_path / "none.parquet", Prompt)
    with pytest.raises(ArtifactError, match=message):
        read_table(tmp_path / "none.parquet")
    with pytest.raises(ArtifactError, match=message):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really", b"\x00" * 100])
def test_a_file_that_is_no_parquet_is_an_error_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    for read in (lambda: read_records(path, Prompt), lambda: read_table(path)):
        with pytest.raises(
            ArtifactError, match=r"x.parquet: not a readable Parquet file"
        ) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_column_of_another_version_is_named(tmp_path: Path) -> None:
    write_table(tmp_path / "x.parquet", {"prompt_id": ["1"], "text": ["t"]})
    with pytest.raises(ArtifactError, match="column 'split' is missing; the file is of another"):
        read_records(tmp_path / "x.parquet", Prompt)


def test_a_csv_is_for_people(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.csv"
    write_csv(
        path, [{"name": "é, x", "value": 1 / 3, "num": 2}, {"name": "", "value": NAN, "num": 3}]
    )
    assert path.read_bytes().decode() == 'name,value,num\r\n"é, x",0.333333,2\r\n,,3\r\n'
    write_csv(path, [])
    assert path.read_text(encoding="utf-8") == ""


def test_json_has_no_nan_and_no_order(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": NAN, "a": [math.inf, 0.1, ("é", None)], "c": {"x": np.float64("nan")}})
    assert path.read_text(encoding="utf-8").startswith('{\n  "a"')
    assert read_json(path) == {"a": [None, 0.1, ["é", None]], "b": None, "c": {"x": None}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"x.json: not valid JSON"):
        read_json(path)
