"""RewardBench's format (Lambert et al. 2024) as evaluation input: `prompt`, `chosen`, `rejected`, `subset`.

`chosen` and `rejected` are responses beside a `prompt` text, message lists, or (without `prompt`) whole hh dialogues.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morlaif_ray.config.inputs import HubSource
from morlaif_ray.data.dialogues import as_prompt, as_response
from morlaif_ray.data.files import EXTENSIONS, expand_paths, read_rows
from morlaif_ray.data.formats import Example, parse_conversational, parse_hh
from morlaif_ray.data.hub import read_hub_rows
from morlaif_ray.data.rows import RawRow, RowProblem
from morlaif_ray.errors import DataError

NO_SUBSET = "all rows"
"""Subset of rows that name none."""


@dataclass(frozen=True, slots=True)
class SubsetPair:
    """A labelled pair with the subset that it counts for."""

    subset: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class SubsetPairs:
    """What one file or hub split holds."""

    pairs: list[SubsetPair]
    num_identical: int
    """Rows left out because both responses are equal."""


def read_rewardbench(data: str, split: str = "filtered") -> SubsetPairs:
    """Reads a local file or folder, else the hub data set `data`. DataError names file, line and reason."""
    pairs: list[SubsetPair] = []
    num_identical = 0
    for row in _rows(data, split):
        try:
            if row.problem:
                raise RowProblem(row.problem)
            if not isinstance(row.value, Mapping):
                raise RowProblem(f"must be an object with keys, not {type(row.value).__name__}")
            example, subset = parse_rewardbench(row.value)
        except RowProblem as problem:
            raise DataError(
                f"{row.file}: {row.unit} {row.line}: {problem}; mend or drop the row"
            ) from None
        if example.first == example.second:
            num_identical += 1
            continue
        pairs.append(SubsetPair(subset, example.prompt, example.first, example.second))
    if not pairs:
        raise DataError(f"{data}: no pair with two different responses to evaluate on")
    return SubsetPairs(pairs, num_identical)


def parse_rewardbench(row: Mapping[str, Any]) -> tuple[Example, str]:
    """(pair with the chosen response first, subset) of one row."""
    subset = row.get("subset")
    if subset is not None and not isinstance(subset, str):
        raise RowProblem(f"'subset' must be text, not {type(subset).__name__}")
    name = (subset or "").strip() or NO_SUBSET
    if isinstance(row.get("chosen"), list):
        return parse_conversational(row), name
    if row.get("prompt") is None:
        return parse_hh(row), name
    texts = {}
    for key in ("prompt", "chosen", "rejected"):
        value = row.get(key)
        if not isinstance(value, str):
            found = "missing" if value is None else f"{type(value).__name__}"
            raise RowProblem(f"'{key}' must be text, but is {found}")
        texts[key] = value
    prompt = as_prompt(texts["prompt"])
    chosen, rejected = (as_response(texts[key], key) for key in ("chosen", "rejected"))
    return Example(prompt, chosen, rejected, 1.0), name


def _rows(data: str, split: str) -> Iterator[RawRow]:
    path = Path(data)
    if path.exists() or data.endswith(EXTENSIONS):
        for file in expand_paths([path]):
            yield from read_rows(file)
    else:
        yield from read_hub_rows(HubSource(id=data, split=split))
