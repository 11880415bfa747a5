"""The run full of faults: 20% of requests fail, the driver is SIGKILLed three times, each worker once.

The server's answers are a known function of pair and phrase, so the ledger can be checked row by row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from benchmarks.feedback_parts import (
    load_server,
    local_ray,
    make_batches,
    make_config,
    make_plan,
    make_pool,
    rows_of,
)
from morlaif_ray.feedback.ledger import KILLED
from morlaif_ray.feedback.ledger_schema import read_unconfirmed

WORKERS = 4
DRIVER_KILLS = (0.2, 0.4, 0.6)
"""Shares of the judgements at which the driver is killed."""
FAULT_SHARE = 0.2
TIMEOUT_S = 3.0
PART_TIMEOUT_S = 1800.0
START_S = 120.0
"""Longest wait for a run's workers to be up."""


def run_driver(task: dict[str, Any]) -> None:
    """The process that is killed: asks all questions and ends."""
    scratch = Path(task["scratch"])
    feedback = _config(task["url"], scratch)
    plan = make_plan(feedback)
    batches = make_batches(plan, task["questions"], per_batch=1040)
    with local_ray(), make_pool(feedback, plan, scratch / "faults.sqlite") as pool:
        outcomes = pool.answer(batches)
    print(json.dumps({"failed": sum(outcome.num_failed for outcome in outcomes)}))


def _config(url: str, scratch: Path) -> Any:
    judge = {"request_timeout_s": TIMEOUT_S}
    return make_config(
        url,
        scratch,
        judge=judge,
        num_workers=WORKERS,
        max_in_flight=16,
        max_attempts=8,
        retry_failed=3,
    )


def measure_faults(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Lost, doubled and mislabelled judgements after all the kills, and the spend of both sides."""
    server, questions = load_server(), options.fault_questions
    ledger = scratch / "faults.sqlite"
    settings = server.ServerOptions(fault_share=FAULT_SHARE, hang_s=TIMEOUT_S + 2.0)
    kills = Counter[str]()
    started_s = time.monotonic()
    with server.FaultyServer(settings) as provider:
        task = {"url": provider.url, "scratch": str(scratch), "questions": questions}
        for share in options.driver_kills:
            driver = _start(task)
            if _wait_rows(driver, ledger, share * questions):
                driver.send_signal(signal.SIGKILL)
                kills["driver"] += 1
            driver.wait()
            time.sleep(3.0)  # its actors notice that it is gone
        driver = _start(task)
        workers: list[psutil.Process] = []
        for number in range(options.worker_kills):
            if _wait_rows(driver, ledger, (0.65 + 0.05 * number) * questions):
                workers = workers or _workers_of(driver)  # the first four, not their successors
                for victim in workers[number : number + 1]:  # none where the run ended too soon
                    victim.kill()
                    kills["worker"] += 1
        driver.wait(timeout=PART_TIMEOUT_S)
        assert driver.returncode == 0, driver.returncode
        stats = provider.stats()
    return _check(options, scratch, ledger, stats) | {
        "faults_driver_kills": kills["driver"],
        "faults_worker_kills": kills["worker"],
        "faults_seconds": round(time.monotonic() - started_s, 1),
    }


def _start(task: dict[str, Any]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.feedback", "--driver", json.dumps(task)]
    # It ends with the pipe, so with this process, however that ends.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def _wait_rows(driver: subprocess.Popen[bytes], ledger: Path, rows: float) -> bool:
    """True once so many answers are recorded; False where the driver ended first."""
    deadline_s = time.monotonic() + PART_TIMEOUT_S
    while rows_of(ledger) < rows:
        if driver.poll() is not None or time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def _workers_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All of them: the run asks as soon as one is up, the others follow."""
    found: list[psutil.Process] = []
    deadline_s = time.monotonic() + START_S
    while len(found) < WORKERS and driver.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
        with contextlib.suppress(psutil.Error):  # some process has just ended
            children = psutil.Process(driver.pid).children(recursive=True)
            found = [child for child in children if child.name().startswith("ray::FeedbackWo")]
    return found


def _check(
    options: argparse.Namespace, scratch: Path, ledger: Path, stats: dict[str, Any]
) -> dict[str, Any]:
    server = load_server()
    plan = make_plan(_config("http://127.0.0.1:1/v1", scratch))
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db:
        recipe = db.execute("SELECT recipe FROM recipes").fetchone()[0]
        rows = db.execute(
            "SELECT key, pair_id, principle, slot, log_odds, reason, cost_usd FROM answers"
        ).fetchall()
        failed = db.execute("SELECT count(*) FROM failures").fetchone()[0]
        doubts = {entry.doubt: (entry.requests, entry.usd) for entry in read_unconfirmed(db)}
    plan = type(plan)(plan.principles, plan.orders, plan.seed, recipe)
    wanted = {
        question.key: (batch.pairs[number // plan.per_pair].pair_id, question)
        for batch in make_batches(plan, options.fault_questions, per_batch=1040)
        for number, question in enumerate(plan.batch_questions(batch))
    }
    times = Counter(row[0] for row in rows)
    mislabelled = unreadable = 0
    for key, pair_id, principle, slot, log_odds, reason, _ in rows:
        owner, question = wanted[key]
        phrase = f"{question.phrase} Answer with a single letter, A or B."
        truth = server.true_log_odds(question.first, question.second, phrase)
        if (pair_id, principle, slot) != (owner, question.principle, question.order):
            mislabelled += 1
        elif reason:
            unreadable += 1
        elif log_odds is None or not math.isclose(log_odds, truth, abs_tol=1e-6):
            mislabelled += 1
    spent = math.fsum(row[6] for row in rows)
    died, unread = doubts.get(KILLED, (0, 0.0)), [v for k, v in doubts.items() if k != KILLED]
    at_most = spent + died[1]
    return {
        "faults_questions": len(wanted),
        "faults_lost": sum(key not in times for key in wanted),
        "faults_doubled": sum(count - 1 for count in times.values()),
        "faults_mislabelled": mislabelled,
        "faults_unreadable_answers": unreadable,
        "faults_given_up": failed,
        "faults_requests": stats["requests"],
        "faults_paid_but_lost_to_kills": stats["answered"] - len(rows),
        "faults_spend_ledger_usd": round(spent, 6),
        "faults_spend_server_usd": round(stats["billed_usd"], 6),
        "faults_spend_unconfirmed_usd": round(died[1], 6),
        "faults_unconfirmed_requests": died[0],
        "faults_spend_within_bounds": spent - 1e-9 <= stats["billed_usd"] <= at_most + 1e-9,
        "faults_unreadable_attempts": sum(requests for requests, _ in unread),
        "faults_unreadable_attempts_usd": round(math.fsum(usd for _, usd in unread), 6),
        "faults_by_kind": stats["faults"],
    }
