"""What would make a driver grow with the number of steps: rows of the log, and malloc's heaps per thread; and what
actors that compute ask of malloc."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import allocation
from tests.unit.test_arm_record import METRICS, record_in

pytestmark = pytest.mark.unit


def test_a_record_holds_no_more_after_many_steps_than_after_one(tmp_path: Path) -> None:
    def held(record: Any) -> int:
        return sum(
            len(v) for v in vars(record).values() if isinstance(v, list | dict | tuple | str)
        )

    record = record_in(tmp_path, num_steps=50)
    record.add(1, METRICS, {})
    before = held(record)
    for step in range(2, 51):
        record.add(step, METRICS, {})
    assert held(record) == before


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (allocation.limit_arenas, [(-8, 2)]),
        (allocation.keep_freed_memory, [(-3, 2**30), (-1, 2**31 - 1)]),
    ],
)
def test_malloc_is_asked_where_the_c_library_has_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[], None], expected: list[tuple[int, int]]
) -> None:
    asked: list[tuple[int, int]] = []
    glibc = SimpleNamespace(mallopt=lambda option, value: asked.append((option, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: glibc)
    monkeypatch.setattr(sys, "platform", "linux")
    ask()
    assert asked == expected  # numbers of glibc's malloc.h
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # musl
    ask()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: glibc)
    ask()
    assert asked == expected
