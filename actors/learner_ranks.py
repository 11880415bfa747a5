"""Rank 0's view of the other ranks of a learner: asked together, waited for, and ended as a whole."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from actors.supervision import KilledAtStartError, one_line, was_killed
from morlaif_ray.errors import ActorLostError, MorlaifError
from morlaif_ray.rl.ranks import Ranks, leave_ranks

WATCH_S = 0.2
"""How often rank 0, while it waits for the group to form, looks whether the others still live."""
CAUSE_TIMEOUT_S = 5.0
"""How long a failing rank 0 waits for the other ranks' own causes."""


class OtherRanks:
    """Rank 0's view of ranks 1..N-1; empty on those, and where there is one rank."""

    def __init__(self, handles: Sequence[Any] = ()) -> None:
        self._handles = list(handles)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Asks all of them; arguments go to the object store once."""
        if not self._handles:
            return []
        import ray

        stored = [ray.put(argument) for argument in arguments]
        return [getattr(handle, method).remote(*stored) for handle in self._handles]

    def begin(
        self, join: Callable[[], Ranks], make: Callable[[Ranks], None], timeout_s: float
    ) -> None:
        """Joins the group, then makes this rank. ActorLostError as soon as another rank is seen to be lost:
        KilledAtStartError where one was killed, so that the next group may come up.

        A rank that is lost before it joined leaves the others waiting for it inside `join`, up to the call time-out:
        so rank 0 joins in a thread and looks after the others meanwhile.
        """
        starting = [handle.begin.remote() for handle in self._handles]
        try:
            make(self._join(join, starting))
        except MorlaifError:  # the same on every rank, or a rank that is lost
            if not self._handles:
                leave_ranks()  # what rank 0 may wait for fails at once
            raise
        except Exception as error:
            leave_ranks()
            failures = self._failures(starting)
            if not failures:
                raise
            causes = [f"rank 0: {_first_line(error)}", *_causes(failures)]
            raise _start_error(failures)(_lost(causes)) from None
        if not self._all_up(starting, timeout_s):
            raise ActorLostError(_lost([f"one is not up after {timeout_s:.0f} s"]))

    def _join(self, join: Callable[[], Ranks], starting: Sequence[Any]) -> Ranks:
        if not starting:
            return join()
        joined: Future[Ranks] = Future()

        def work() -> None:
            try:
                joined.set_result(join())
            except BaseException as error:  # noqa: BLE001 - raised where the result is taken
                joined.set_exception(error)

        # A daemon: where a rank is lost nothing ends this wait, and nothing should wait for it.
        threading.Thread(target=work, name="join ranks", daemon=True).start()
        while not joined.done():
            self._all_up(starting, WATCH_S)
        return joined.result()

    def _all_up(self, starting: Sequence[Any], timeout_s: float) -> bool:
        """Whether all ranks are up, after at most so long; ActorLostError where one never will be."""
        if not starting:
            return True
        import ray

        ready, _ = ray.wait(list(starting), num_returns=len(starting), timeout=timeout_s)
        for rank, reference in enumerate(starting, start=1):
            if reference not in ready:
                continue
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                kind = _start_error({rank: error})
                if kind is ActorLostError:  # it may have failed because another one was killed
                    kind = _start_error(self._failures(starting))
                raise kind(_lost([f"rank {rank}: {_why(error)}"])) from None
        return len(ready) == len(starting)

    def pids(self, timeout_s: float) -> list[int]:
        import ray

        answers = ray.get([h.pids.remote() for h in self._handles], timeout=timeout_s)
        return [pid for answer in answers for pid in answer]

    def finish(self, pending: Sequence[Any], timeout_s: float) -> None:
        """Waits for their part. This rank is done, so theirs is a matter of moments; a lost one ends the group."""
        if not pending:
            return
        import ray

        try:
            ray.get(list(pending), timeout=timeout_s)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            self.end(pending, error)

    def end(self, pending: Sequence[Any], error: Exception) -> None:
        """Ends rank 0 with the cause in its log. Ranks without others (1..N-1) go on to raise the error instead."""
        if not self._handles:
            return
        causes = [f"rank 0: {_first_line(error)}", *_causes(self._failures(pending))]
        print(_lost(causes), file=sys.stderr, flush=True)
        os._exit(1)

    def _failures(self, pending: Sequence[Any]) -> dict[int, Exception]:
        """What the other ranks met, by rank, after a moment."""
        import ray

        failures: dict[int, Exception] = {}
        deadline = time.monotonic() + CAUSE_TIMEOUT_S
        for rank, reference in enumerate(pending, start=1):
            try:
                ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                failures[rank] = error
        return failures


def _causes(failures: Mapping[int, Exception]) -> list[str]:
    return [f"rank {rank}: {_first_line(error)}" for rank, error in failures.items()]


def _start_error(failures: Mapping[int, Exception]) -> type[ActorLostError]:
    killed = any(was_killed(error) for error in failures.values())
    return KilledAtStartError if killed else ActorLostError


def _lost(causes: Sequence[str]) -> str:
    return f"PPO learner: a rank was lost ({'; '.join(causes)})"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _why(error: Exception) -> str:
    """What ended a rank: the error that its own code raised, or what Ray says of its process."""
    import ray

    said = error
    if isinstance(error, ray.exceptions.RayTaskError):  # with its traceback before it
        said = RuntimeError(_first_line(error))
    return one_line(said)
