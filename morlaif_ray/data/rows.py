"""A raw row and where it came from; what is wrong with it, if anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as the source gave it. `problem` is set, and `value` None, where it could not even be decoded."""

    file: str
    line: int
    """Line of a text file, row of a .json list, a Parquet file or a hub split; from 1."""
    unit: str
    """What `line` counts: "line" or "row"."""
    value: Any
    problem: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A malformed row that was skipped. Written to `bad_rows.jsonl` as it is."""

    file: str
    line: int
    reason: str


class RowProblem(Exception):
    """What is wrong with one row, without its place: `loading` adds file and line."""
