"""The status as a person reads it, from a ledger that is being written."""

from __future__ import annotations

import dataclasses
import math
import sqlite3
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from morlaif_ray.artifacts import write_json
from morlaif_ray.errors import ArtifactError, FeedbackError
from morlaif_ray.feedback.export import export_answers
from morlaif_ray.feedback.intents import Intent, Settled
from morlaif_ray.feedback.judgement_table import JudgementTable
from morlaif_ray.feedback.ledger import FailureRow, Ledger, LedgerRow
from morlaif_ray.feedback.status import Progress, describe, doubts_in_words, duration, read_status
from morlaif_ray.types import Judgement

pytestmark = pytest.mark.unit


def row(pair: str, slot: str, log_odds: float, cost: float = 0.01) -> LedgerRow:
    key = f"{pair}{slot}".encode()
    return LedgerRow(
        key, pair, "detail", slot, log_odds, 0.9, "", "{}", "m-1", 100, 1, cost, 0.1, 1, 40, 0.002
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Three pairs in both orders: log-odds 1, 2, -1 for a, bias 0.5 each; people: a, b, b."""
    ledger = Ledger(tmp_path / "l.sqlite", lock_wait_s=0.0)
    ledger.register("recipe", "{}", "template")
    for pair, value in (("p1", 1.0), ("p2", 2.0), ("p3", -1.0)):
        ledger.append("recipe", [row(pair, "ab", value + 0.5), row(pair, "ba", -value + 0.5)])
    ledger.append("recipe", [], [FailureRow(b"x", "p4", "detail", "ab", "timeout: no answer", 6)])
    return ledger


LABELS = {"p1": 1.0, "p2": 0.0, "p3": 0.0}


def note(path: Path, **changes: object) -> Path:
    now_s = time.time()
    progress = Progress("recipe", 20, 7, 1, 0, now_s - 60, now_s, True, "server: HTTP 500", "")
    target = path / "progress.json"
    write_json(target, dataclasses.asdict(dataclasses.replace(progress, **changes)))  # type: ignore[arg-type]
    return target


def test_it_reads_beside_the_writer_and_counts_everything(ledger: Ledger, tmp_path: Path) -> None:
    status = read_status(ledger.path, note(tmp_path), LABELS)
    assert (status.left, status.totals.answers) == (13, 6)
    assert status.totals.cost_usd == pytest.approx(0.06)
    assert status.totals.list_usd == pytest.approx(0.072)
    (detail,) = status.principles
    assert detail.mean_position_bias == pytest.approx(0.5)
    assert (detail.human_agreement.value, detail.human_agreement.num) == (pytest.approx(2 / 3), 3)
    assert status.errors == (("timeout: no answer", 1),)
    ledger.append("recipe", [row("p5", "ab", 1.0)])  # the reader holds no lock
    ledger.close()


def test_rate_and_time_left_come_from_the_last_minute(ledger: Ledger, tmp_path: Path) -> None:
    status = read_status(ledger.path, note(tmp_path), {}, now_s=time.time() + 30.0)
    assert status.rate_per_min == pytest.approx(12.0, rel=0.2)  # 6 answers in 30 s
    assert status.eta_s == pytest.approx(65.0, rel=0.2)
    late = read_status(ledger.path, note(tmp_path), {}, now_s=time.time() + 90.0)
    assert late.rate_per_min == 0.0
    assert math.isnan(late.eta_s)


def test_in_words(ledger: Ledger, tmp_path: Path) -> None:
    lines = describe(read_status(ledger.path, note(tmp_path), LABELS))
    assert lines[0] == "running: 7 of 20 questions done (35.0%), 13 left, 1 failed"
    text = "\n".join(lines)
    assert "last failed attempt: server: HTTP 500" in text
    assert "spent $0.0600 on 6 answers" in text
    assert "less $0.0120 for the prompt cache" in text
    assert "+0.500 nats" in text
    assert "66.7% (" in text
    assert "1 x timeout: no answer" in text


def test_what_may_have_been_billed_is_said_beside_what_was(ledger: Ledger, tmp_path: Path) -> None:
    ledger.announce([Intent(number, b"k", 0.004) for number in range(3)])
    text = "\n".join(describe(read_status(ledger.path, note(tmp_path), {})))
    assert "possibly" not in text  # they may still be answered
    settled = [Settled(0), Settled(1, "no readable answer (timeout)")]
    ledger.append("recipe", [], [], settled)
    ledger.close()  # whoever had the third is gone
    text = "\n".join(describe(read_status(ledger.path, note(tmp_path), {})))
    assert "possibly $0.0080 more, at most: 2 requests" in text
    assert "1 x in flight when a process died" in text
    assert "1 x no readable answer (timeout)" in text
    assert "\n".join(doubts_in_words(ledger.path)) in text


def test_where_nothing_is_in_doubt_nothing_is_said(ledger: Ledger) -> None:
    assert doubts_in_words(ledger.path) == []


def test_a_run_that_died_and_one_that_stopped_are_told_apart(
    ledger: Ledger, tmp_path: Path
) -> None:
    died = describe(read_status(ledger.path, note(tmp_path, updated_s=time.time() - 300), {}))
    assert died[0].startswith("no sign of life for 5 min")
    stopped = describe(read_status(ledger.path, note(tmp_path, running=False), {}))
    assert stopped[0].startswith("stopped; the same command goes on: 7 of 20")


def test_no_ledger_and_a_newer_ledger_are_one_line(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no ledger here"):
        read_status(tmp_path / "none.sqlite", tmp_path / "p.json", {})
    ledger.close()
    with sqlite3.connect(ledger.path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(FeedbackError, match="newer version"):
        read_status(ledger.path, tmp_path / "p.json", {})


def test_durations_are_for_people() -> None:
    assert [duration(value) for value in (45.2, 720.0, 12_000.0)] == [
        "45 s",
        "12 min",
        "3 h 20 min",
    ]


def test_the_export_holds_the_answers_of_these_pairs_with_all_that_was_paid(
    ledger: Ledger, tmp_path: Path
) -> None:
    target = tmp_path / "answers.parquet"
    assert export_answers(ledger.path, target, {"p1", "p3"}, "recipe") == 4
    table = pq.read_table(target).to_pydict()
    assert table["pair_id"] == ["p1", "p1", "p3", "p3"]
    assert table["key"][0] == b"p1ab".hex()
    assert set(table["model"]) == {"m-1"}
    assert table["cached_tokens"] == [40] * 4
    assert len(set(table["template_hash"])) == 1
    assert export_answers(ledger.path, target, {"p1"}, "another recipe") == 0
    ledger.close()


def test_a_ledger_of_version_one_is_taken_over_with_its_spending(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    db = sqlite3.connect(path)
    db.executescript(
        "CREATE TABLE recipes (id INTEGER PRIMARY KEY, recipe TEXT UNIQUE NOT NULL, judge TEXT NOT NULL, template TEXT "
        "NOT NULL); CREATE TABLE answers (key BLOB PRIMARY KEY, pair_id TEXT NOT NULL, principle TEXT NOT NULL, slot "
        "TEXT NOT NULL, log_odds REAL, mass REAL NOT NULL, reason TEXT NOT NULL, logprobs TEXT NOT NULL, model TEXT "
        "NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost_usd REAL NOT NULL, "
        "latency_s REAL NOT NULL, attempts INTEGER NOT NULL, recipe INTEGER NOT NULL, created_s REAL NOT NULL) "
        "WITHOUT ROWID; PRAGMA user_version=1;"
        "INSERT INTO recipes VALUES (1, 'recipe', '{}', 't');"
        "INSERT INTO answers VALUES (x'02','p','d','ab',1.5,.9,'','{}','m',10,1,0.25,.1,1,1,20.0),"
        "(x'01','p','d','ba',NULL,.9,'refused','{}','m',10,1,0.5,.1,1,1,10.0);"
    )
    db.close()
    ledger = Ledger(path, lock_wait_s=0.0)
    assert (ledger.num_answers(), ledger.spent_usd) == (2, 0.75)
    assert ledger.lookup([b"\x02"])[b"\x02"].log_odds == 1.5
    ledger.append("recipe", [row("p9", "ab", 1.0)])
    assert ledger.num_answers() == 3
    ledger.close()


def test_judgements_in_columns_read_as_the_objects_that_went_in() -> None:
    nan = math.nan
    entries = [
        Judgement("p1", "detail", "ok", 1.25, 0.5, "", "m"),
        Judgement("p1", "general", "unusable", nan, nan, "ab: refused", "m"),
        Judgement("p2", "detail", "tie", 0.01, nan, "", "n"),
    ]
    table = JudgementTable(entries)
    assert len(table) == 3
    assert next(iter(table)) == entries[0]
    assert table[-1].judge == "n"
    assert (table[1].reason, math.isnan(table[1].log_odds)) == ("ab: refused", True)
    assert [entry.pair_id for entry in table[:2]] == ["p1", "p1"]
    with pytest.raises(IndexError):
        table[3]
