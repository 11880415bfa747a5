"""Nothing is paid twice, nothing recorded is lost, nobody shares a ledger by accident."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.ledger import FailureRow, Ledger, LedgerRow

pytestmark = pytest.mark.unit


def row(key: bytes, log_odds: float = 1.0, cost_usd: float = 0.01) -> LedgerRow:
    reason = "refused" if math.isnan(log_odds) else ""
    return LedgerRow(
        key, "pair", "detail", "ab", log_odds, 0.9, reason, "{}", "m", 100, 1, cost_usd, 0.1, 1
    )


def opened(path: Path) -> Ledger:
    ledger = Ledger(path, lock_wait_s=0.0)
    ledger.register("recipe", "{}", "template")
    return ledger


def test_answers_come_back_after_reopening(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "l.sqlite")
    ledger.append("recipe", [row(b"1"), row(b"2", math.nan)])
    ledger.close()
    again = opened(tmp_path / "l.sqlite")
    found = again.lookup([b"1", b"2", b"3"])
    assert set(found) == {b"1", b"2"}
    assert found[b"1"].log_odds == 1.0
    assert math.isnan(found[b"2"].log_odds)
    assert found[b"2"].reason == "refused"
    again.close()


def test_the_first_answer_stays_and_is_paid_once(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "l.sqlite")
    ledger.append("recipe", [row(b"1", 1.0)])
    ledger.append("recipe", [row(b"1", 2.0), row(b"2")])
    assert ledger.lookup([b"1"])[b"1"].log_odds == 1.0
    assert ledger.spent_usd == pytest.approx(0.02)
    assert ledger.num_answers() == 2
    ledger.close()


def test_failures_are_listed_and_leave_with_their_answer(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "l.sqlite")
    failed = [FailureRow(key, "pair", "detail", "ab", "timeout", 6) for key in (b"1", b"2")]
    ledger.append("recipe", [], failed)
    assert ledger.failures() == [("timeout", 2)]
    assert ledger.lookup([b"1"]) == {}
    ledger.append("recipe", [row(b"1")])
    assert ledger.failures() == [("timeout", 1)]
    ledger.close()


def test_a_second_run_on_the_same_ledger_is_refused_in_one_line(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "l.sqlite")
    with pytest.raises(
        FeedbackError, match=rf"in use by another run \(process {os.getpid()} on .*ledger_path"
    ):
        Ledger(tmp_path / "l.sqlite", lock_wait_s=0.0)
    ledger.close()
    opened(tmp_path / "l.sqlite").close()


def test_a_killed_process_leaves_its_answers_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from morlaif_ray.feedback.ledger import Ledger, LedgerRow\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "ledger.register('recipe', '{}', 't')\n"
        "ledger.append('recipe', [LedgerRow(b'1', 'p', 'd', 'ab', 1.0, 0.9, '', '{}', 'm', 1, 1, 0.0, 0.1, 1)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(path)], check=False, cwd=Path(__file__).parents[3]
    )
    ledger = opened(path)
    assert set(ledger.lookup([b"1"])) == {b"1"}
    ledger.close()


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "l.sqlite").close()
    with sqlite3.connect(tmp_path / "l.sqlite") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(FeedbackError, match="newer version"):
        opened(tmp_path / "l.sqlite")


def test_a_file_that_is_no_ledger_is_refused_and_the_lock_is_free_again(tmp_path: Path) -> None:
    (tmp_path / "l.sqlite").write_bytes(b"not a database" * 100)
    for _ in range(2):
        with pytest.raises(FeedbackError, match="not a readable ledger"):
            opened(tmp_path / "l.sqlite")


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "l.sqlite")
    ledger.append("recipe", [row(b"1")])
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count={pages}")  # SQLite's own way to run out of space
    with pytest.raises(FeedbackError, match=r"full.*free some space"):
        ledger.append("recipe", [row(bytes([i, j])) for i in range(100) for j in range(100)])
    assert set(ledger.lookup([b"1"])) == {b"1"}
    assert ledger.spent_usd == pytest.approx(0.01)
    ledger.close()
