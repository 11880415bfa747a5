"""Money and secrets on a real local Ray: the budget is a hard stop, a run resumes, a key is written nowhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.feedback_pool import FeedbackPool
from actors.ledger_writer import LedgerRecipe
from jobs.cli import main
from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.asking import TASKS_PER_REQUEST
from morlaif_ray.feedback.intents import Intent
from morlaif_ray.feedback.ledger import KILLED, Ledger
from morlaif_ray.feedback.permits import BudgetReachedError
from morlaif_ray.feedback.questions import split_batches
from morlaif_ray.feedback.rate import Cost
from morlaif_ray.feedback.status import read_progress
from tests.fake_openai.server import KEY, FakeOpenAI
from tests.local_ray import local_ray
from tests.processes import WAIT_S, kill, once
from tests.unit.feedback.fakes import PLAN, make_pairs

pytestmark = pytest.mark.actors
KEY_ENV = "MORLAIF_TEST_JUDGE_KEY"
WRONG_KEY = "sk-wrong-9876543210fedcba"
WRONG_KEY_ENV = "MORLAIF_TEST_WRONG_KEY"


@pytest.fixture(scope="module")
def session_folder() -> Iterator[Path]:
    """The folder of a local Ray."""
    os.environ |= {KEY_ENV: KEY, WRONG_KEY_ENV: WRONG_KEY}
    with local_ray(log_to_driver=True) as folder:
        yield folder


def priced(folder: Path, server: FakeOpenAI, **changes: object) -> FeedbackConfig:
    """Each question about `make_pairs` costs some 0.0005 $ at 5 $ per million tokens."""
    prices = folder / "prices.yaml"
    prices.write_text("as_of: 2026-11-21\nmodels:\n  fake: {prompt: 5.0, completion: 5.0}\n")
    judge = {"kind": "openai", "model": "fake", "base_url": server.url, "api_key_env": KEY_ENV}
    judge["request_timeout_s"] = WAIT_S  # no request is sent twice because this machine is slow
    values = {"judge": judge, "max_in_flight": 4, "num_workers": 2, "prices_file": prices}
    return FeedbackConfig.model_validate(values | changes)


def pool_of(feedback: FeedbackConfig, folder: Path) -> FeedbackPool:
    (folder / "logs").mkdir(exist_ok=True)
    return FeedbackPool(
        feedback,
        PLAN,
        folder / "l.sqlite",
        LedgerRecipe(PLAN.recipe, json.dumps({"model": "fake"}), "template"),
        seed=0,
        start_timeout_s=WAIT_S,
        progress_path=folder / "logs" / "feedback_progress.json",
    )


def test_the_budget_ends_the_run_cleanly_and_a_higher_one_goes_on(
    session_folder: Path, tmp_path: Path
) -> None:
    batches = list(split_batches(make_pairs(40), PLAN, questions_per_batch=16))
    with FakeOpenAI(delay_s=0.01) as server:
        with (
            pool_of(priced(tmp_path, server, budget_usd=0.02), tmp_path) as pool,
            pytest.raises(
                BudgetReachedError, match=r"budget_usd is reached.*raise budget_usd"
            ) as caught,
        ):
            pool.answer(batches)
        assert caught.value.exit_code == 8
        ledger = Ledger(tmp_path / "l.sqlite")
        spent, recorded = ledger.spent_usd, ledger.num_answers()
        ledger.close()
        # What was in flight when the budget ended is recorded: all that was paid for, and no more than allowed. How
        # near it comes depends on what the two workers held back at that moment.
        assert recorded == server.num_answered
        assert spent == pytest.approx(server.tokens_billed * 5.0 / 1e6)
        assert 0.0 < spent <= 0.02
        progress = read_progress(tmp_path / "logs" / "feedback_progress.json")
        assert progress is not None
        assert (progress.running, progress.total) == (False, 160)
        with pool_of(priced(tmp_path, server, budget_usd=5.0, num_workers=1), tmp_path) as pool:
            assert pool.num_recorded_before == recorded
            outcomes = pool.answer(batches)
        assert sum(outcome.num_failed for outcome in outcomes) == 0
        assert server.num_answered == 160
        total = sum(outcome.cost_usd for outcome in outcomes)
        assert total == pytest.approx(server.tokens_billed * 5.0 / 1e6)


def test_what_a_killed_worker_had_in_flight_is_counted_as_possibly_spent(
    session_folder: Path, tmp_path: Path
) -> None:
    import ray

    batches = list(split_batches(make_pairs(40), PLAN, questions_per_batch=16))
    with FakeOpenAI(hold_after=40) as server:
        with pool_of(priced(tmp_path, server), tmp_path) as pool:

            def both_wait() -> bool:
                recorded = ray.get(pool._ledger.open.remote(), timeout=WAIT_S)
                return len(server.bodies) >= 40 + 2 * 4 and recorded == 40

            killer = once(both_wait, lambda: (kill(pool.workers[0]), server.release()))
            outcomes = pool.answer(batches)
            killer.join(WAIT_S)
            assert ray.get(pool._ledger.spent_usd.remote(), timeout=WAIT_S) > 0.0
        billed = server.tokens_billed * 5.0 / 1e6
    assert sum(outcome.num_failed for outcome in outcomes) == 0
    ledger = Ledger(tmp_path / "l.sqlite")
    assert ledger.num_answers() == 160
    doubts = {entry.doubt: entry.requests for entry in ledger.unconfirmed}
    # Its four requests in flight, and what else its two batches had announced: twice as many as may be in flight.
    assert 4 <= doubts[KILLED] <= 2 * TASKS_PER_REQUEST * 4
    assert len(server.bodies) == 160 + 4
    assert ledger.spent_usd < billed <= ledger.possibly_spent_usd
    ledger.close()


def test_a_restarted_limiter_counts_what_the_one_before_let_go(
    session_folder: Path, tmp_path: Path
) -> None:
    import ray

    with (
        FakeOpenAI() as server,
        pool_of(priced(tmp_path, server, budget_usd=1.0, num_workers=1), tmp_path) as pool,
    ):
        pool.wait_until_started()
        one, nothing = Cost(0.0, 0.3), Cost(0.0, 0.0)
        ray.get(
            pool._ledger.announce.remote([Intent(i, b"k", 0.3) for i in (1, 2)]), timeout=WAIT_S
        )
        first = ray.get(pool._limiter.acquire.remote([one] * 4, nothing, nothing), timeout=WAIT_S)
        assert first.count == 3  # of 1.00: what is announced is not yet let go
        ray.kill(pool._limiter, no_restart=False)
        again, deadline = first, time.monotonic() + WAIT_S
        while again is first or (
            not again.count and time.monotonic() < deadline
        ):  # the old one has 0.10 left
            again = ray.get(
                pool._limiter.acquire.remote([one] * 4, nothing, nothing), timeout=WAIT_S
            )
        assert again.count == 1  # of 0.40: two estimates are taken
        used = Cost(0.0, 0.5)  # both end at 0.25, and the refund of 0.10 is true
        last = ray.get(
            pool._limiter.acquire.remote([Cost(0.0, 0.19)] * 4, Cost(0.0, 0.6), used),
            timeout=WAIT_S,
        )
        assert last.count == 1


def test_a_resumed_run_begins_with_what_is_not_answered(
    session_folder: Path, tmp_path: Path
) -> None:
    batches = list(split_batches(make_pairs(40), PLAN, questions_per_batch=16))
    with FakeOpenAI() as server:
        feedback = priced(tmp_path, server, num_workers=1)
        with pool_of(feedback, tmp_path) as pool:
            pool.answer(batches[:6])
        with pool_of(feedback, tmp_path) as pool:
            assert pool.unfinished_first(batches) == [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]


def test_a_wrong_key_costs_a_handful_of_requests_and_no_key_is_written_anywhere(
    session_folder: Path, tmp_path: Path
) -> None:
    batches = list(split_batches(make_pairs(40), PLAN, questions_per_batch=16))
    with FakeOpenAI() as server:
        judge = {"kind": "openai", "model": "fake", "base_url": server.url}
        wrong = priced(tmp_path, server, judge=judge | {"api_key_env": WRONG_KEY_ENV})
        with (
            pool_of(wrong, tmp_path) as pool,
            pytest.raises(FeedbackError, match=f"refused the key in {WRONG_KEY_ENV}") as caught,
        ):
            pool.answer(batches)
        assert WRONG_KEY not in str(caught.value)
        assert len(server.bodies) <= 2 * 2 * 4  # workers x batches under way x slow start
        server.faults.extend(["500", "400", "invalid_json"])
        with pool_of(priced(tmp_path, server, num_workers=1), tmp_path) as pool:
            pool.answer(batches)
    searched = 0
    for folder in (tmp_path, session_folder):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                searched += 1
                content = path.read_bytes()
                assert KEY.encode() not in content, path
                assert WRONG_KEY.encode() not in content, path
    assert searched > 10


def test_the_status_verb_reads_a_run_without_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["feedback", "status", "--run-dir", str(tmp_path)]) == 3
    assert "no run folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("feedback: {}\n")
    (tmp_path / "ledger").mkdir()
    Ledger(tmp_path / "ledger" / "feedback.sqlite").close()
    assert main(["feedback", "status", "--run-dir", str(tmp_path)]) == 0
    assert "0 answers in the ledger" in capsys.readouterr().out
