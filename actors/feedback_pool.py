"""Async workers that ask the judge, and the driver's side that hands them batches and survives their death.

    FeedbackPool.answer(batches) -> FeedbackWorker.work(batch) (N actors) -> BatchOutcome
                                      | lookup, announce, append | acquire, pause
                                    ledger_writer (1 actor)    rate_limiter (1 actor, only with limits or a budget)

A worker looks its batch up in the ledger first, so a batch that is sent again (worker killed, driver killed, extra
round) asks only what is not yet paid. That lets Ray restart workers and repeat their batches, within `MAX_RESTARTS`.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.feedback_dispatch import Dispatch, first_line
from actors.feedback_worker import own_error, spawn_feedback_worker, worker_cpus
from actors.ledger_writer import LedgerRecipe, spawn_ledger_writer
from actors.rate_limiter import spawn_rate_limiter
from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.errors import ActorLostError, FeedbackError, ResourceError
from morlaif_ray.feedback.prices import price_for_budget
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan
from morlaif_ray.feedback.recording import BatchOutcome

QUESTIONS_PER_BATCH = 2048
MAX_RESTARTS = 5
CALL_TIMEOUT_S = 120.0
"""Longest wait for one call to ledger or limiter, restarts included."""
LOCK_WAIT_S = 15.0
"""A killed run's ledger writer needs a moment to go away before its lock counts as another run's."""
WIND_DOWN_S = 5.0
"""After an early end, so long beyond one request's time-out may the requests in flight take to end."""
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
        progress_path: Path | None = None,
    ) -> None:
        # An impossible budget fails before anything starts.
        price_for_budget(feedback.judge, feedback.budget_usd, feedback.prices_file)
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
        self.progress_path = progress_path
        """Where the driver notes what `morlaif feedback status` cannot see in the ledger; None: nowhere."""
        self.recipe = plan.recipe
        self.per_pair = plan.per_pair
        self.keeps_a_rate = bool(feedback.requests_per_minute or feedback.tokens_per_minute)
        """Then nothing is sent before all workers are up: those that start would take the CPU of those that must send
        on time."""
        self.wind_down_s = request_s + WIND_DOWN_S
        self.retry_rounds = feedback.retry_failed
        self._ledger: Any = None
        self._limiter: Any = None
        self.workers: list[Any] = []
        self._starting: list[Any] = []
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
        limited = feedback.requests_per_minute or feedback.tokens_per_minute or feedback.budget_usd
        if limited or feedback.judge.kind == "openai":  # a provider may have limits that we learn
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
        # Not repeated where a worker dies: its batches are, and they start what they find not started.
        self._starting = [
            worker.start.options(max_task_retries=0).remote() for worker in self.workers
        ]
        # A second run on the same ledger must hear that, not a time-out of its workers.
        self.num_recorded_before = int(
            self._get([self._ledger.open.remote()], self._start_timeout_s)[0]
        )

    def wait_until_started(self) -> None:
        """Raises what kept a worker from starting: a missing key, no room in the cluster, a model that cannot judge.

        Without a rate to keep, the first batches are handed out before: a worker that is up need not wait for others.
        """
        starting, self._starting = self._starting, []
        deadline_s = time.monotonic() + self._start_timeout_s
        for ref in starting:
            with contextlib.suppress(ActorLostError):  # if it died for good, its batch will tell
                self._get([ref], max(0.0, deadline_s - time.monotonic()))

    def _get(self, refs: list[Any], timeout_s: float, late: str = "") -> list[Any]:
        """Our own errors as they are, others in one line; `late` is that of a time-out after the start."""
        import ray

        try:
            return list(ray.get(refs, timeout=timeout_s))
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None
        except ray.exceptions.GetTimeoutError:
            raise ResourceError(
                late
                or f"the feedback actors did not start within {self._start_timeout_s:g} s; they need "
                f"{worker_cpus(self._feedback):g} CPU x {self._feedback.num_workers} workers: reduce "
                f"feedback.num_workers, or raise cluster.start_timeout_s on a slow machine"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise ActorLostError(
                f"a feedback actor died while starting ({first_line(error)})"
            ) from None

    def answer(
        self, batches: Sequence[PairBatch], on_progress: Callable[[int], None] = lambda _: None
    ) -> list[BatchOutcome]:
        """Outcomes in the order of `batches`. `on_progress` gets the number of newly answered questions.

        Batches with failed questions are sent again up to `retry_failed` times. FeedbackError, ActorLostError.
        """
        return Dispatch(self, batches, on_progress).run()

    def unfinished_first(self, batches: Sequence[PairBatch]) -> list[int]:
        """The order in which to work: batches that seem to be recorded whole come last.

        Judged by their first and last pair, so that a run that resumes asks within seconds, however much is recorded.
        """
        numbers = list(range(len(batches)))
        if not self.num_recorded_before or len(batches) <= len(self.workers):
            return numbers
        keys: list[bytes] = []
        for batch in batches:
            for pair in (batch.pairs[0], batch.pairs[-1]):
                keys += [question.key for question in self._plan.questions(pair)]
        known: list[bool] = self._get(
            [self._ledger.recorded.remote(keys)],
            self._call_timeout_s,
            f"the ledger did not say within {self._call_timeout_s:g} s what it holds; is its disk overloaded? Run the "
            f"same command again, nothing recorded is lost",
        )[0]
        each = len(keys) // len(batches)
        return sorted(numbers, key=lambda number: all(known[number * each : (number + 1) * each]))

    def condition(self) -> str:
        """The limiter's one line for people where the circuit breaker is open; else empty."""
        import ray

        if self._limiter is None:
            return ""
        with contextlib.suppress(ray.exceptions.RayError):
            return str(ray.get(self._limiter.condition.remote(), timeout=5.0))
        return ""

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
