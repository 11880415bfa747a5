"""No spending goes unseen: a request is on the disk before it is sent, and what nobody settled counts as doubtful."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.rate_limiter import RateLimiter
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.intents import Announcer, Intent, Settled
from morlaif_ray.feedback.ledger import KILLED, Ledger, LedgerRow
from morlaif_ray.feedback.ledger_schema import SCHEMA_VERSION
from morlaif_ray.feedback.permits import BudgetReachedError
from morlaif_ray.feedback.prices import FREE, Price
from tests.unit.feedback.fakes import (
    FakeJudge,
    MemoryLedger,
    batch_of,
    failing,
    make_runner,
)
from tests.unit.feedback.test_faulty_server import DirectLimiter

pytestmark = pytest.mark.unit
PRICE = Price(10.0, 10.0)  # dollars per million tokens


def row(key: bytes) -> LedgerRow:
    return LedgerRow(key, "pair", "detail", "ab", 1.0, 0.9, "", "{}", "m", 100, 1, 0.01, 0.1, 1)


def test_a_request_is_announced_before_it_is_sent_and_settled_with_its_answer() -> None:
    ledger = MemoryLedger()

    class Watching(FakeJudge):
        async def ask(self, question: Question) -> RawAnswer:
            assert question.key in [intent.key for intent in ledger.open.values()]
            return await super().ask(question)

    outcome = asyncio.run(make_runner(Watching(), ledger, price=PRICE).run(batch_of(5)))
    assert outcome.num_failed == 0
    assert (ledger.num_announcements, ledger.open, ledger.doubts) == (20, {}, [])


def test_what_costs_nothing_is_not_announced() -> None:
    ledger = MemoryLedger()
    asyncio.run(make_runner(FakeJudge(), ledger, price=FREE).run(batch_of(2)))
    assert ledger.num_announcements == 0


@pytest.mark.parametrize(
    ("error", "doubt"),
    [
        (AttemptError("timeout", "late"), "no readable answer (timeout)"),
        (AttemptError("malformed", "cut off"), "no readable answer (malformed)"),
        (AttemptError("connection", "reset"), "no readable answer (connection)"),
        (AttemptError("connection", "refused", sent=False), ""),
        (AttemptError("rate_limit", "HTTP 429"), ""),
        (AttemptError("server", "HTTP 500"), ""),
    ],
)
def test_an_attempt_without_a_readable_answer_may_have_been_billed(
    error: AttemptError, doubt: str
) -> None:
    ledger = MemoryLedger()
    runner = make_runner(FakeJudge(failing(1, error)), ledger, price=PRICE)
    assert asyncio.run(runner.run(batch_of(1))).num_failed == 0
    assert ledger.num_announcements == 8  # four questions, each asked twice
    assert [why for _, why in ledger.doubts] == ([doubt] * 4 if doubt else [])
    assert ledger.open == {}


def test_what_a_killed_process_left_open_is_unconfirmed_spending(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from morlaif_ray.feedback.intents import Intent, Settled\n"
        "from morlaif_ray.feedback.ledger import Ledger, LedgerRow\n"
        "ledger = Ledger(Path(sys.argv[1]), run='first')\n"
        "ledger.register('recipe', '{}', 't')\n"
        "ledger.announce([Intent(1, b'1', 0.02), Intent(2, b'2', 0.03), Intent(3, b'3', 0.04)])\n"
        "row = LedgerRow(b'1', 'p', 'd', 'ab', 1.0, 0.9, '', '{}', 'm', 1, 1, 0.015, 0.1, 1)\n"
        "ledger.append('recipe', [row], [], [Settled(1)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "l.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == -signal.SIGKILL
    ledger = Ledger(path, run="second")
    assert ledger.spent_usd == pytest.approx(0.015)
    assert ledger.unconfirmed == ((KILLED, 2, pytest.approx(0.07)),)
    assert ledger.possibly_spent_usd == pytest.approx(0.085)
    ledger.close()
    again = Ledger(path, run="third")
    assert again.possibly_spent_usd == pytest.approx(0.085)  # counted once, however often opened
    again.close()


def test_a_writer_that_was_restarted_within_its_run_leaves_the_requests_in_flight_alone(
    tmp_path: Path,
) -> None:
    first = Ledger(tmp_path / "l.sqlite", run="run")
    first.register("recipe", "{}", "t")
    first.announce([Intent(1, b"1", 0.02), Intent(2, b"2", 0.02)])
    os.close(first._lock)  # as a killed process does
    first._db.close()
    second = Ledger(tmp_path / "l.sqlite", run="run")
    assert second.unconfirmed == ()
    second.announce([Intent(2, b"2", 0.02)])  # the call that was under way is repeated
    settled = [Settled(1), Settled(2, "late")]
    second.append("recipe", [row(b"1")], [], settled)
    second.append("recipe", [row(b"1")], [], settled)
    assert second.unconfirmed == (("late", 1, pytest.approx(0.02)),)
    assert second.spent_usd == pytest.approx(0.01)
    second.close()


def test_a_ledger_of_version_2_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.register("recipe", "{}", "t")
    ledger.append("recipe", [row(b"1")])
    ledger.close()
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE intents")
        db.execute("DROP TABLE unconfirmed")
        db.execute("PRAGMA user_version=2")
    db.close()
    again = Ledger(path)
    assert set(again.lookup([b"1"])) == {b"1"}
    assert again.unconfirmed == ()
    assert again._db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
    again.close()


def test_many_waiters_share_few_commits_and_all_hear_of_an_error() -> None:
    calls: list[int] = []
    answered = asyncio.Event()

    class Slow(MemoryLedger):
        async def announce(self, intents: Sequence[Intent]) -> None:
            calls.append(len(intents))
            await answered.wait()
            if len(calls) > 2:
                raise FeedbackError("disk full")
            await super().announce(intents)

    async def ask(announcer: Announcer, count: int) -> list[object]:
        waiting = (announcer.announce(b"k", 0.1) for _ in range(count))
        return list(await asyncio.gather(*waiting, return_exceptions=True))

    async def scene() -> None:
        announcer = Announcer(Slow())
        first = asyncio.create_task(ask(announcer, 1))
        while not calls:
            await asyncio.sleep(0)
        others = asyncio.create_task(ask(announcer, 100))
        await asyncio.sleep(0)
        answered.set()
        tickets = [*await others, *await first]
        assert len(set(tickets)) == 101
        assert calls == [1, 100]
        found = await ask(announcer, 3)
        assert [str(error) for error in found] == ["disk full"] * 3

    asyncio.run(scene())


def test_a_request_that_the_budget_forbids_is_withdrawn() -> None:
    ledger = MemoryLedger()
    limiter = DirectLimiter(RateLimiter(None, None, 0.0051, spent_usd=lambda: 0.0))
    runner = make_runner(FakeJudge(), ledger, limiter=limiter, price=PRICE)
    with pytest.raises(BudgetReachedError):
        asyncio.run(runner.run(batch_of(3)))
    assert 0 < len(ledger.rows) < 12
    assert (ledger.open, ledger.doubts) == ({}, [])
