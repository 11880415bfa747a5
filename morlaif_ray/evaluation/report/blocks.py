"""What a page is made of: sections of blocks, with figures formatted for readers.

Contract: plain values that the template prints without further decisions. A missing number prints as "-". All text is
untrusted until the template's autoescape has seen it: nothing here builds HTML.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from morlaif_ray.evaluation.run_tables import Row, RunTables, readable
from morlaif_ray.types import Interval

MISSING = "-"
TEXT, NAME = "text", "name"
"""Forms of a column that is no number: as it is, or an identifier spelled for readers (the CSV keeps it as it is)."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Notice:
    """A sentence that must not be overlooked: something is missing (`plain`) or looks wrong (`warning`)."""

    kind: ClassVar[str] = "notice"
    text: str
    tone: str = "plain"


@dataclass(frozen=True)
class Picture:
    """A figure, embedded."""

    kind: ClassVar[str] = "picture"
    name: str
    caption: str
    alt: str
    data_uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Column:
    """One column of a table: which value, its heading, and how it is printed."""

    key: str
    label: str
    form: str = TEXT
    """`TEXT`, `NAME`, or a number's format such as `{:.3f}`."""
    bounds: tuple[str, str] | None = None
    """Keys of the interval's ends, printed as `value [low, high]`."""

    @property
    def is_number(self) -> bool:
        return self.form not in (TEXT, NAME)

    def show(self, row: Row) -> str:
        value = row.get(self.key)
        if is_missing(value):
            return MISSING
        if not self.is_number:
            return readable(str(value)) if self.form == NAME else str(value)
        text = self.form.format(value)
        if self.bounds is None or any(is_missing(row.get(key)) for key in self.bounds):
            return text
        low, high = (self.form.format(row[key]) for key in self.bounds)
        return f"{text} [{low}, {high}]"


@dataclass(frozen=True)
class Table:
    """A table on the page and, under `name`, as CSV beside it."""

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[Row]
    collapsed: bool = False
    """True: folded away behind its caption."""

    @property
    def cells(self) -> list[list[str]]:
        return [[column.show(row) for column in self.columns] for row in self.rows]

    @property
    def csv_rows(self) -> list[Row]:
        keys = list(
            dict.fromkeys(
                key for column in self.columns for key in (column.key, *(column.bounds or ()))
            )
        )
        return [{key: _csv_value(row.get(key)) for key in keys} for row in self.rows]


@dataclass(frozen=True)
class Cell:
    """One principle's score of one response, as a coloured cell."""

    principle: str
    value: str
    background: str
    ink: str


@dataclass(frozen=True)
class Answer:
    """One policy's response to a sample prompt."""

    policy: str
    text: str
    cells: tuple[Cell, ...]
    true_cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Sample:
    """A prompt with the answers to compare, and further ones folded away."""

    turns: tuple[tuple[str, str], ...]
    """(speaker, text)."""
    answers: tuple[Answer, ...]
    further: tuple[Answer, ...]


@dataclass(frozen=True)
class Samples:
    kind: ClassVar[str] = "samples"
    samples: tuple[Sample, ...]


Block = Text | Notice | Picture | Table | Samples


@dataclass
class Section:
    """One stage of the pipeline on the page. Filled through its methods, in reading order."""

    anchor: str
    title: str
    note: str
    """What is measured and how to read it, in two sentences."""
    tables: RunTables
    figures: dict[str, bytes]
    blocks: list[Block] = field(default_factory=list)

    def text(self, text: str) -> None:
        self.blocks.append(Text(text))

    def notice(self, text: str, tone: str = "plain") -> None:
        self.blocks.append(Notice(text, tone))

    def picture(self, name: str, caption: str, alt: str, absent: str) -> None:
        """Adds a figure, or the sentence `absent` where the run has no data for it."""
        png = self.figures.get(name)
        if png is None:
            self.notice(absent)
            return
        width, height = png_size(png)
        uri = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
        self.blocks.append(Picture(name, caption, alt, uri, width, height))

    def table(
        self,
        name: str,
        caption: str,
        columns: Sequence[Column],
        rows: Sequence[Row],
        *,
        collapsed: bool = False,
    ) -> None:
        """Adds a table without the columns that are missing in every row; nothing where there are no rows."""
        if not rows:
            return
        kept = tuple(c for c in columns if any(not is_missing(row.get(c.key)) for row in rows))
        self.blocks.append(Table(name, caption, kept, rows, collapsed))


def is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def show(value: float | None, form: str = "{:.3f}") -> str:
    """A number for readers; "-" where it is missing."""
    return MISSING if is_missing(value) else form.format(value)


def show_interval(interval: Interval, form: str = "{:.3f}") -> str:
    """`0.662 [0.641, 0.683]`; the bare value without an interval; "-" where missing."""
    value = show(interval.value, form)
    if value == MISSING or math.isnan(interval.low) or math.isnan(interval.high):
        return value
    return f"{value} [{form.format(interval.low)}, {form.format(interval.high)}]"


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    width, height = struct.unpack(">II", png[16:24])
    return int(width), int(height)


def _csv_value(value: Any) -> Any:
    return "" if is_missing(value) else value
