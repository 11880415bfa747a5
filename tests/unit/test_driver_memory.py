"""What would make a driver grow with the number of steps: rows of the log, and malloc's heaps per thread."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import session
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


def test_the_driver_keeps_to_few_arenas_where_the_c_library_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    glibc = SimpleNamespace(mallopt=lambda option, value: asked.append((option, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: glibc)
    monkeypatch.setattr(sys, "platform", "linux")
    session.limit_arenas()
    assert asked == [(-8, 2)]  # M_ARENA_MAX of glibc's malloc.h
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # musl
    session.limit_arenas()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: glibc)
    session.limit_arenas()
    assert len(asked) == 1
