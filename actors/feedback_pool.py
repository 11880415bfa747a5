"""Async workers that ask the judge, and the driver's side that hands them batches and survives their death.

    FeedbackPool.answer(batches) -> FeedbackWorker.work(batch) (N actors) -> BatchOutcome
                                      | lookup, append           | acquire, pause
                                    ledger_writer (1 actor)    rate_limiter (1 actor, only with limits or a budget)

A worker looks its batch up in the ledger first, so a batch that is sent again (worker killed, driver killed, extra
round) asks only what is not yet paid. That lets Ray restart workers and repeat their batches, within `MAX_RESTARTS`.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.feedback_worker import Heartbeat, own_error, spawn_feedback_worker, worker_cpus
from actors.ledger_writer import LedgerRecipe, spawn_ledger_writer
from actors.rate_limiter import spawn_rate_limiter
from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.errors import ActorLostError, FeedbackError, ResourceError
from morlaif_ray.feedback.asking import BatchOutcome
from morlaif_ray.feedback.prices import price_for_budget
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan

QUESTIONS_PER_BATCH = 2048
BATCHES_PER_WORKER = 2  # the next batch begins while the last answers of one come in
MAX_RESTARTS = 5
POLL_S = 0.5
HEARTBEAT_EVERY_S = 1.0
CALL_TIMEOUT_S = 120.0
"""Longest wait for one call to ledger or limiter, restarts included."""
LOCK_WAIT_S = 15.0
"""A killed run's ledger writer needs a moment to go away before its lock counts as another run's."""
STALL_TIMEOUT_S = 180.0
"""A worker without any sign of life for this long, beyond one request's time-out, is killed and restarted."""


class FeedbackPool:
    """Starts the actors on entry and ends them on exit; what is in the ledger stays.

    with FeedbackPool(feedback, plan, ledger_path, recipe, seed=0, start_timeout_s=180) as pool:
        outcomes = pool.answer(batches, on_progress)
    """

    def __init__(
        self,
        feedback: FeedbackConfig,
        plan: QuestionPlan,
        ledger_path: Path,
        recipe: LedgerRecipe,
        *,
        seed: int,
        start_timeout_s: float,
        max_restarts: int = MAX_RESTARTS,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        call_timeout_s: float = CALL_TIMEOUT_S,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        price_for_budget(
            feedback.judge, feedback.budget_usd
        )  # an impossible budget fails before anything starts
        self._feedback = feedback
        self._plan = plan
        self._path = ledger_path
        self._recipe = recipe
        self._seed = seed
        self._start_timeout_s = start_timeout_s
        self.max_restarts = max_restarts
        self._call_timeout_s = call_timeout_s
        self._lock_wait_s = lock_wait_s
        request_s = feedback.judge.request_timeout_s if feedback.judge.kind == "openai" else 0.0
        self.stall_timeout_s = stall_timeout_s + request_s
        self.retry_rounds = feedback.retry_failed
        self._ledger: Any = None
        self._limiter: Any = None
        self.workers: list[Any] = []
        self.num_recorded_before = 0
        """Answers in the ledger when the pool started."""

    def __enter__(self) -> FeedbackPool:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start(self) -> None:
        feedback = self._feedback
        tag = uuid.uuid4().hex[:12]
        ledger_name, limiter_name = f"ledger_writer-{tag}", f"rate_limiter-{tag}"
        self._ledger = spawn_ledger_writer(
            self._path,
            self._recipe,
            name=ledger_name,
            max_restarts=self.max_restarts,
            lock_wait_s=self._lock_wait_s,
        )
        if feedback.requests_per_minute or feedback.tokens_per_minute or feedback.budget_usd:
            self._limiter = spawn_rate_limiter(
                feedback.requests_per_minute,
                feedback.tokens_per_minute,
                feedback.budget_usd,
                name=limiter_name,
                ledger_name=ledger_name,
                max_restarts=self.max_restarts,
                timeout_s=self._call_timeout_s,
            )
        self.workers = [
            spawn_feedback_worker(
                feedback,
                self._plan,
                self._seed,
                ledger_name,
                limiter_name if self._limiter is not None else None,
                max_restarts=self.max_restarts,
                call_timeout_s=self._call_timeout_s,
            )
            for _ in range(feedback.num_workers)
        ]
        # The ledger first: a second run on the same ledger must hear that, not a time-out of its workers.
        self.num_recorded_before = int(self._get([self._ledger.open.remote()])[0])
        self._get([worker.start.remote() for worker in self.workers])

    def _get(self, refs: list[Any]) -> list[Any]:
        import ray

        try:
            return list(ray.get(refs, timeout=self._start_timeout_s))
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None
        except ray.exceptions.GetTimeoutError:
            raise ResourceError(
                f"the feedback actors did not start within {self._start_timeout_s:g} s; they need "
                f"{worker_cpus(self._feedback):g} CPU x {self._feedback.num_workers} workers: reduce "
                f"feedback.num_workers, or raise cluster.start_timeout_s on a slow machine"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise ActorLostError(
                f"a feedback actor died while starting ({_first_line(error)})"
            ) from None

    def answer(
        self, batches: Sequence[PairBatch], on_progress: Callable[[int], None] = lambda _: None
    ) -> list[BatchOutcome]:
        """Outcomes in the order of `batches`. `on_progress` gets the number of newly answered questions.

        Batches with failed questions are sent again up to `retry_failed` times. FeedbackError, ActorLostError.
        """
        return _Dispatch(self, batches, on_progress).run()

    def _end(self) -> None:
        import ray

        actors = [*self.workers, *([self._limiter] if self._limiter is not None else [])]
        for actor in actors:
            ray.kill(actor)
        if self._ledger is not None:
            # Where it died or never opened: its lock ends with its process, the WAL is folded in by the next run.
            with contextlib.suppress(ray.exceptions.RayError, FeedbackError):
                ray.get(self._ledger.close.remote(), timeout=30.0)
            ray.kill(self._ledger)
        self.workers, self._limiter, self._ledger = [], None, None


class _Dispatch:
    """One pass over the batches: keeps the workers fed, watches their signs of life, collects outcomes."""

    def __init__(
        self, pool: FeedbackPool, batches: Sequence[PairBatch], on_progress: Callable[[int], None]
    ) -> None:
        self._pool = pool
        self._batches = batches
        self._queue = deque(range(len(batches)))
        self._outcomes: dict[int, BatchOutcome] = {}
        self._rounds = [0] * len(batches)
        self._under_way: dict[Any, tuple[int, int]] = {}  # ref -> (worker, batch)
        self._on_progress = on_progress
        self._reported = 0
        now_s = time.monotonic()
        self._signs = [(-1, now_s) for _ in pool.workers]
        self._pulses: dict[Any, int] = {}  # heartbeat ref -> worker
        self._partial: dict[int, dict[int, int]] = {}
        self._asked_pulse_s = now_s

    def run(self) -> list[BatchOutcome]:
        import ray

        while self._queue or self._under_way:
            self._feed()
            ready, _ = ray.wait(list(self._under_way), num_returns=1, timeout=POLL_S)
            for ref in ready:
                self._collect(ref)
            self._watch()
            self._report()
        return [self._outcomes[number] for number in range(len(self._batches))]

    def _feed(self) -> None:
        loads = [0] * len(self._pool.workers)
        for worker, _ in self._under_way.values():
            loads[worker] += 1
        while self._queue and min(loads) < BATCHES_PER_WORKER:
            worker = loads.index(min(loads))
            number = self._queue.popleft()
            ref = self._pool.workers[worker].work.remote(self._batches[number])
            self._under_way[ref] = worker, number
            loads[worker] += 1

    def _collect(self, ref: Any) -> None:
        import ray

        worker, number = self._under_way.pop(ref)
        try:
            outcome: BatchOutcome = ray.get(ref, timeout=CALL_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None
        except ray.exceptions.RayActorError as error:
            raise ActorLostError(
                f"feedback worker {worker} died more often than its {self._pool.max_restarts} restarts allow "
                f"({_first_line(error)}); run the same command again, nothing recorded is lost"
            ) from None
        self._outcomes[number] = outcome
        if outcome.num_failed and self._rounds[number] < self._pool.retry_rounds:
            self._rounds[number] += 1
            self._queue.append(number)

    def _watch(self) -> None:
        """Asks for heartbeats; kills (and Ray restarts) a worker that has shown no sign of life for too long."""
        import ray

        now_s = time.monotonic()
        if self._pulses:
            ready, _ = ray.wait(list(self._pulses), num_returns=len(self._pulses), timeout=0)
            for ref in ready:
                self._read_pulse(ref, now_s)
        if not self._pulses and now_s - self._asked_pulse_s >= HEARTBEAT_EVERY_S:
            self._asked_pulse_s = now_s
            for index, worker in enumerate(self._pool.workers):
                pulse = worker.heartbeat.options(concurrency_group="control").remote()
                self._pulses[pulse] = index
        busy = {worker for worker, _ in self._under_way.values()}
        for index, (signs, since_s) in enumerate(self._signs):
            if index not in busy:
                self._signs[index] = signs, now_s
            elif now_s - since_s > self._pool.stall_timeout_s:
                ray.kill(self._pool.workers[index], no_restart=False)
                self._signs[index] = -1, now_s
                self._pulses = {ref: owner for ref, owner in self._pulses.items() if owner != index}

    def _read_pulse(self, ref: Any, now_s: float) -> None:
        import ray

        index = self._pulses.pop(ref)
        try:
            pulse: Heartbeat = ray.get(ref, timeout=CALL_TIMEOUT_S)
        except ray.exceptions.RayError:
            return  # it is being restarted; its batch says when that fails
        if pulse.signs_of_life != self._signs[index][0]:
            self._signs[index] = pulse.signs_of_life, now_s
        self._partial[index] = pulse.done

    def _report(self) -> None:
        done = sum(len(outcome.log_odds_N) for outcome in self._outcomes.values())
        for worker, number in self._under_way.values():
            if number not in self._outcomes:
                done += self._partial.get(worker, {}).get(self._batches[number].index, 0)
        if done > self._reported:
            self._on_progress(done - self._reported)
            self._reported = done


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
