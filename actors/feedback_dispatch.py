"""One pass over the batches: keeps the workers fed, watches their signs of life, collects outcomes.

    Dispatch(pool, batches, on_progress).run() -> outcomes in the order of the batches

A batch may be sent again at any time: its worker finds in the ledger what is paid. Whatever ends the pass early
(budget, refused key, Ctrl-C), what is in flight is recorded first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from actors.feedback_worker import Heartbeat, own_error
from morlaif_ray.artifacts import write_json
from morlaif_ray.errors import ActorLostError
from morlaif_ray.feedback.questions import PairBatch
from morlaif_ray.feedback.recording import BatchOutcome
from morlaif_ray.feedback.status import Progress

if TYPE_CHECKING:
    from actors.feedback_pool import FeedbackPool

BATCHES_PER_WORKER = 2  # the next batch begins while the last answers of one come in
POLL_S = 0.5
HEARTBEAT_EVERY_S = 1.0
NOTE_EVERY_S = 2.0
RESULT_TIMEOUT_S = 120.0
"""Longest wait for the result of a call that has ended."""


class Dispatch:
    """One pass over the batches: keeps the workers fed, watches their signs of life, collects outcomes."""

    def __init__(
        self, pool: FeedbackPool, batches: Sequence[PairBatch], on_progress: Callable[[int], None]
    ) -> None:
        self._pool = pool
        self._batches = batches
        self._queue = deque(pool.unfinished_first(batches))
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
        self._started_at_s = time.time()
        self._noted_s = -NOTE_EVERY_S
        self._last_error = ""

    def run(self) -> list[BatchOutcome]:
        try:
            self._loop()
        except BaseException:
            self._wind_down()
            raise
        finally:
            self._note(last=True)
        return [self._outcomes[number] for number in range(len(self._batches))]

    def _loop(self) -> None:
        import ray

        if not self._pool.keeps_a_rate:
            self._feed()
        self._pool.wait_until_started()
        self._signs = [(-1, time.monotonic()) for _ in self._pool.workers]
        while self._queue or self._under_way:
            self._feed()
            ready, _ = ray.wait(list(self._under_way), num_returns=1, timeout=POLL_S)
            for ref in ready:
                self._collect(ref)
            self._watch()
            self._report()
            self._note()

    def _wind_down(self) -> None:
        """What is in flight has been paid for: the workers finish and record it, and start nothing more."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            for worker in self._pool.workers:
                worker.stop.options(concurrency_group="control", max_task_retries=0).remote()
            refs = list(self._under_way)
            if refs:
                ray.wait(refs, num_returns=len(refs), timeout=self._pool.wind_down_s)

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
            outcome: BatchOutcome = ray.get(ref, timeout=RESULT_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None
        except ray.exceptions.RayActorError as error:
            raise ActorLostError(
                f"feedback worker {worker} died more often than its {self._pool.max_restarts} restarts allow "
                f"({first_line(error)}); run the same command again, nothing recorded is lost"
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
                pulse = worker.heartbeat.options(
                    concurrency_group="control", max_task_retries=0
                ).remote()
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
            pulse: Heartbeat = ray.get(ref, timeout=RESULT_TIMEOUT_S)
        except ray.exceptions.RayError:
            return  # it is being restarted; its batch says when that fails
        if pulse.signs_of_life != self._signs[index][0]:
            self._signs[index] = pulse.signs_of_life, now_s
        self._partial[index] = pulse.done
        self._last_error = pulse.last_error or self._last_error

    def _report(self) -> None:
        done = sum(len(outcome.log_odds_N) for outcome in self._outcomes.values())
        for worker, number in self._under_way.values():
            if number not in self._outcomes:
                done += self._partial.get(worker, {}).get(self._batches[number].index, 0)
        if done > self._reported:
            self._on_progress(done - self._reported)
            self._reported = done

    def _note(self, *, last: bool = False) -> None:
        """What the ledger does not know, for `morlaif feedback status`: see `feedback.status.Progress`."""
        path, now_s = self._pool.progress_path, time.monotonic()
        if path is None or (now_s - self._noted_s < NOTE_EVERY_S and not last):
            return
        self._noted_s = now_s
        answered = self._outcomes.values()
        progress = Progress(
            recipe=self._pool.recipe,
            total=sum(len(batch.pairs) for batch in self._batches) * self._pool.per_pair,
            done=self._reported,
            failed=sum(outcome.num_failed for outcome in answered),
            recorded_before=self._pool.num_recorded_before,
            started_s=self._started_at_s,
            updated_s=time.time(),
            running=not last,
            last_error=self._last_error,
            condition="" if last else self._pool.condition(),
        )
        with contextlib.suppress(OSError):  # a note for people must not end a paid run
            write_json(path, dataclasses.asdict(progress))


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
