"""One async worker that asks the judge, and its view of the ledger and the limiter.

    FeedbackWorker.work(batch) -> RemoteLedger.lookup, append / RemoteLimiter.acquire, pause -> BatchOutcome

A plain class around `morlaif_ray.feedback.asking.BatchRunner`; `spawn_feedback_worker` gives it a process. A batch may
be worked on twice: what is recorded is not asked again. So Ray may restart a worker and repeat its batches.

The other actors are found by name: a handle among the constructor's arguments would lie in the object store, and Ray
cannot restart an actor whose arguments were evicted from there (ray-project/ray#53727).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.errors import ActorLostError, MorlaifError
from morlaif_ray.feedback.asking import AnswerLedger, BatchOutcome, BatchRunner
from morlaif_ray.feedback.breaker import News
from morlaif_ray.feedback.client import HasProcesses
from morlaif_ray.feedback.headers import RateHints
from morlaif_ray.feedback.intents import Intent, Settled
from morlaif_ray.feedback.judges import answer_tokens, build_feedback_client
from morlaif_ray.feedback.ledger import FailureRow, LedgerRow, StoredAnswer
from morlaif_ray.feedback.permits import Limiter
from morlaif_ray.feedback.prices import price_for_budget
from morlaif_ray.feedback.prompting import prompter_for
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan
from morlaif_ray.feedback.rate import Cost, Grant
from morlaif_ray.feedback.retry import RetryPolicy

if TYPE_CHECKING:
    import ray.actor


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent by workers about every second. Consumed by the driver for progress and to notice a hang."""

    signs_of_life: int
    done: dict[int, int]
    """Batch index -> questions answered so far, for the batches under way."""
    last_error: str = ""
    """The last failed attempt in words, retried or not."""


class _ByName:
    """An actor that is found when the first call needs it."""

    who: ClassVar[str]

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s

    @cached_property
    def _handle(self) -> ray.actor.ActorHandle:
        import ray

        return ray.get_actor(self._name)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Awaits one remote call; our own errors come back as they are, a lost actor in one line."""
        import ray

        try:
            reference = getattr(self._handle, method).remote(*arguments)
            return await asyncio.wait_for(reference, self._timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None
        except TimeoutError:
            raise ActorLostError(
                f"the {self.who} did not answer within {self._timeout_s:g} s; is its disk or node overloaded?"
            ) from None
        except ray.exceptions.RayActorError:
            raise ActorLostError(
                f"the {self.who} died too often; run the same command again, nothing recorded is lost"
            ) from None


class RemoteLedger(_ByName):
    """The ledger actor as `asking.AnswerLedger`."""

    who = "ledger"

    async def lookup(self, keys: Sequence[bytes]) -> dict[bytes, StoredAnswer]:
        found: dict[bytes, StoredAnswer] = await self._call("lookup", list(keys))
        return found

    async def announce(self, intents: Sequence[Intent]) -> None:
        await self._call("announce", list(intents))

    async def append(
        self,
        rows: Sequence[LedgerRow],
        failures: Sequence[FailureRow],
        settled: Sequence[Settled],
    ) -> None:
        await self._call("append", list(rows), list(failures), list(settled))


class RemoteLimiter(_ByName):
    """The limiter actor as `permits.Limiter`."""

    who = "rate limiter"

    async def acquire(self, wanted: Sequence[Cost], estimated: Cost, actual: Cost) -> Grant:
        answer: Grant = await self._call("acquire", list(wanted), estimated, actual)
        return answer

    async def pause(self, wait_s: float) -> None:
        await self._call("pause", wait_s)

    async def report(self, news: News, hints: RateHints | None) -> None:
        await self._call("report", news, hints)


def own_error(error: Any) -> BaseException:
    """The MorlaifError inside a RayTaskError, else the error itself."""
    cause = error.cause
    return cause if isinstance(cause, MorlaifError) else error


class FeedbackWorker:
    """One client, many requests in flight. `limiter` is None where neither rate nor budget is limited."""

    def __init__(
        self,
        feedback: FeedbackConfig,
        plan: QuestionPlan,
        seed: int,
        ledger: AnswerLedger,
        limiter: Limiter | None,
    ) -> None:
        self._feedback = feedback
        self._plan = plan
        self._seed = seed
        self._ledger = ledger
        self._limiter = limiter
        self._opened: BatchRunner | None = None

    @property
    def _runner(self) -> BatchRunner:
        """Built with the first call, not in the constructor, so that a missing key reaches the driver as one line."""
        if self._opened is None:
            feedback = self._feedback
            client = build_feedback_client(feedback, seed=self._seed)
            if isinstance(client, HasProcesses):
                # Ray then starts this worker again, with all of them, and repeats its batches.
                client.when_lost(lambda: os._exit(1))
            self._opened = BatchRunner(
                client,
                self._plan,
                self._ledger,
                policy=RetryPolicy(max_attempts=feedback.max_attempts),
                price=price_for_budget(feedback.judge, feedback.budget_usd, feedback.prices_file),
                max_in_flight=feedback.max_in_flight,
                limiter=self._limiter,
                answer_tokens=partial(answer_tokens, feedback.judge),
                head_tokens=prompter_for(feedback).head_tokens,
            )
        return self._opened

    async def start(self) -> None:
        assert self._runner is not None

    async def work(self, batch: PairBatch) -> BatchOutcome:
        return await self._runner.run(batch)

    async def heartbeat(self) -> Heartbeat:
        if self._opened is None:
            return Heartbeat(0, {})
        runner = self._opened
        return Heartbeat(runner.signs_of_life, dict(runner.done), runner.last_error)

    async def stop(self) -> None:
        """Lets what is in flight end and be recorded; batches under way then raise."""
        if self._opened is not None:
            self._opened.stop()


def worker_cpus(feedback: FeedbackConfig) -> float:
    """CPUs that one worker reserves: embedded and local judges compute, an API client mostly waits."""
    judge = feedback.judge
    if judge.kind == "local":
        return float(judge.slices)
    return 1.0 if judge.kind == "rules" else 0.5


def worker_gpus(feedback: FeedbackConfig) -> float:
    """GPUs that one worker reserves: only a local judge has a use for one."""
    return feedback.judge.gpus_per_worker if feedback.judge.kind == "local" else 0.0


def spawn_feedback_worker(
    feedback: FeedbackConfig,
    plan: QuestionPlan,
    seed: int,
    ledger_name: str,
    limiter_name: str | None,
    *,
    max_restarts: int,
    call_timeout_s: float,
) -> ray.actor.ActorHandle:
    import ray

    # "control" runs beside the work, so a worker that waits for a provider still tells that it lives.
    remote = ray.remote(concurrency_groups={"control": 1})(FeedbackWorker)
    return remote.options(
        num_cpus=worker_cpus(feedback),
        num_gpus=worker_gpus(feedback),
        max_restarts=max_restarts,
        max_task_retries=max_restarts,
    ).remote(
        feedback,
        plan,
        seed,
        RemoteLedger(ledger_name, call_timeout_s),
        RemoteLimiter(limiter_name, call_timeout_s) if limiter_name is not None else None,
    )
