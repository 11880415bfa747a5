"""Records and tables on disk: Parquet for records, CSV for people, JSON for small things.

`write_records(path, records)` and `read_records(path, cls)` keep the dataclass's field order and types, so the file's
schema is the record's documentation in `types.py`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from morlaif_ray.errors import ArtifactError

Record = TypeVar("Record")

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _arrow_schema(cls: type[Any]) -> pa.Schema:
    hints = typing.get_type_hints(cls)
    fields = []
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if typing.get_origin(hint) is typing.Literal:
            hint = str
        fields.append(pa.field(item.name, _ARROW[hint]))
    return pa.schema(fields)


def write_records(path: Path, records: Sequence[Any], cls: type[Any]) -> None:
    """Writes flat dataclass records (str, int, float, bool, Literal fields) as one Parquet file."""
    schema = _arrow_schema(cls)
    columns = {name: [getattr(record, name) for record in records] for name in schema.names}
    table = pa.Table.from_pydict(columns, schema=schema)
    pq.write_table(table, path, compression="zstd")


def read_records(path: Path, cls: type[Record]) -> list[Record]:
    """Reads what `write_records` wrote; ArtifactError names the file and what is wrong."""
    table = _read_parquet(path)
    names = [item.name for item in dataclasses.fields(typing.cast(Any, cls))]
    absent = [name for name in names if name not in table.column_names]
    if absent:
        raise ArtifactError(
            f"{path}: column '{absent[0]}' is missing; the file is of another version"
        )
    columns = [table.column(name).to_pylist() for name in names]
    return [cls(*values) for values in zip(*columns, strict=True)]


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes named columns of equal length as Parquet."""
    pq.write_table(pa.table(dict(columns)), path, compression="zstd")


def read_table(path: Path) -> dict[str, list[Any]]:
    """Reads what `write_table` wrote: column name -> values."""
    return typing.cast("dict[str, list[Any]]", _read_parquet(path).to_pydict())


def _read_parquet(path: Path) -> Any:
    if not path.is_file():
        raise ArtifactError(f"{path}: missing; run the stage that makes it first")
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})"
        ) from None


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows of equal keys as CSV, floats with six significant digits, NaN empty."""
    materialised = [dict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        if not materialised:
            return
        writer = csv.DictWriter(stream, fieldnames=list(materialised[0]))
        writer.writeheader()
        for row in materialised:
            writer.writerow({key: _short(value) for key, value in row.items()})


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with NaN as null, written to a temporary name and renamed."""
    text = json.dumps(_nan_to_null(value), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; run the stage that makes it first") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON ({error})") from None


def _nan_to_null(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _nan_to_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_to_null(item) for item in value]
    return value
