"""Judgements as columns: a Sequence[Judgement] of some 30 bytes each, whose objects are made while they are looked at.

With 160,000 pairs and 13 questions there are two million judgements; as objects they would fill half a gigabyte.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from morlaif_ray.types import Judgement, JudgementStatus

STATUSES: tuple[JudgementStatus, ...] = ("ok", "tie", "unusable", "failed")


class _Texts:
    """Texts that repeat, each held once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.texts: list[str] = []
        self.column = array("i")

    def append(self, text: str) -> None:
        number = self._numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        self.column.append(number)

    def __getitem__(self, row: int) -> str:
        return self.texts[self.column[row]]


class JudgementTable(Sequence[Judgement]):
    """Grows at its end; rows are never changed. A slice is a list of `Judgement`."""

    def __init__(self, judgements: Iterable[Judgement] = ()) -> None:
        self._pairs = _Texts()
        self._principles = _Texts()
        self._reasons = _Texts()
        self._judges = _Texts()
        self._statuses = array("b")
        self._log_odds = array("d")
        self._biases = array("d")
        self.extend(judgements)

    def extend(self, judgements: Iterable[Judgement]) -> None:
        for entry in judgements:
            self._pairs.append(entry.pair_id)
            self._principles.append(entry.principle)
            self._statuses.append(STATUSES.index(entry.status))
            self._log_odds.append(entry.log_odds)
            self._biases.append(entry.position_bias)
            self._reasons.append(entry.reason)
            self._judges.append(entry.judge)

    def __len__(self) -> int:
        return len(self._log_odds)

    def _row(self, row: int) -> Judgement:
        return Judgement(
            self._pairs[row],
            self._principles[row],
            STATUSES[self._statuses[row]],
            self._log_odds[row],
            self._biases[row],
            self._reasons[row],
            self._judges[row],
        )

    @overload
    def __getitem__(self, index: int) -> Judgement: ...
    @overload
    def __getitem__(self, index: slice) -> list[Judgement]: ...
    def __getitem__(self, index: int | slice) -> Judgement | list[Judgement]:
        if isinstance(index, slice):
            return [self._row(row) for row in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(index)
        return self._row(row)

    def __iter__(self) -> Iterator[Judgement]:
        return map(self._row, range(len(self)))
