"""The answering loop against a server that fails one request in five, in all the ways that servers fail."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.rate_limiter import RateLimiter
from morlaif_ray.config.judging import OpenAIJudge
from morlaif_ray.feedback.asking import BatchRunner
from morlaif_ray.feedback.breaker import News
from morlaif_ray.feedback.headers import RateHints
from morlaif_ray.feedback.judges import build_client
from morlaif_ray.feedback.prices import Price
from morlaif_ray.feedback.questions import PairBatch
from morlaif_ray.feedback.rate import Cost, Grant
from morlaif_ray.feedback.recording import BatchOutcome
from morlaif_ray.feedback.retry import RetryPolicy
from tests.fake_openai.faulty import KEY, FaultyServer, ServerOptions, true_log_odds
from tests.unit.feedback.fakes import PLAN, MemoryLedger, make_pairs

pytestmark = pytest.mark.unit
KEY_ENV = "MORLAIF_TEST_FAULTY_KEY"
BATCH = PairBatch(0, tuple(make_pairs(60)))


class DirectLimiter:
    """The real limiter behind the Protocol, without Ray."""

    def __init__(self, limiter: RateLimiter) -> None:
        self._limiter = limiter

    async def acquire(self, wanted: Sequence[Cost], estimated: Cost, actual: Cost) -> Grant:
        return self._limiter.acquire(wanted, estimated, actual)

    async def pause(self, wait_s: float) -> None:
        self._limiter.pause(wait_s)

    async def report(self, news: News, hints: RateHints | None) -> None:
        self._limiter.report(news, hints)


def ask(server: FaultyServer, ledger: MemoryLedger, per_minute: float | None) -> BatchOutcome:
    judge = OpenAIJudge(model="m", base_url=server.url, api_key_env=KEY_ENV, request_timeout_s=3.0)

    async def run() -> BatchOutcome:
        client = build_client(judge, seed=0)
        limiter = RateLimiter(per_minute, None, None, spent_usd=lambda: 0.0)
        runner = BatchRunner(
            client,
            PLAN,
            ledger,
            policy=RetryPolicy(max_attempts=10, base_wait_s=0.01, max_wait_s=0.2),
            price=Price(0.15, 0.60),
            max_in_flight=16,
            limiter=DirectLimiter(limiter),
        )
        try:
            return await runner.run(BATCH)
        finally:
            await client.close()

    return asyncio.run(run())


def test_every_question_is_answered_once_rightly_and_paid_as_the_server_billed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    ledger = MemoryLedger()
    with FaultyServer(ServerOptions(fault_share=0.2, slow_s=0.05, seed=3)) as server:
        outcome = ask(server, ledger, None)
        stats = server.stats()
    assert (outcome.num_failed, len(ledger.rows)) == (0, 240)
    assert stats["answered"] == 240
    assert stats["requests"] > 240
    assert outcome.cost_usd == pytest.approx(stats["billed_usd"], rel=1e-9)
    for question in PLAN.batch_questions(BATCH):
        row = ledger.rows[question.key]
        phrase = f"{question.phrase} Answer with a single letter, A or B."
        if row.reason:
            assert row.reason in ("the judge refused", "no log-probabilities in the answer")
        else:
            truth = true_log_odds(question.first, question.second, phrase)
            assert row.log_odds == pytest.approx(truth, abs=1e-9)


def test_an_allowed_rate_is_kept_without_a_single_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    with FaultyServer(ServerOptions(requests_per_minute=6000.0, send_headers=True)) as server:
        assert ask(server, MemoryLedger(), 6000.0).num_failed == 0
        stats = server.stats()
    assert stats["rejected_429"] == 0
    span_s = stats["arrivals_s"][-1] - stats["arrivals_s"][0]
    assert span_s > 2.0  # 240 requests at 100 per second, less the burst of 10


def test_the_server_ends_with_whoever_started_it_however_that_ends() -> None:
    code = (
        "import time\n"
        "from benchmarks.feedback_parts import load_server\n"
        "server = load_server()\n"
        "with server.FaultyServer(server.ServerOptions()) as server:\n"
        "    print(server.port, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    ) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=5.0):
            pass
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    pytest.fail("the server outlived its parent")


def test_the_server_is_where_the_benchmark_looks_for_it() -> None:
    assert (Path(__file__).parents[2] / "fake_openai" / "faulty.py").is_file()
