"""Calls that survive the death of an actor.

A `SupervisedActor` is one slot: when its process dies or hangs, a fresh one takes its place (within a restart budget),
is brought up to date by `after_start`, and the lost call is sent again. Only idempotent methods may be called this way:
every method of this package's actors is, because samples are seeded by content and scores are pure.
"""

from __future__ import annotations

import errno
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from morlaif_ray.errors import ActorLostError, MorlaifError


class KilledAtStartError(ActorLostError):
    """A process was ended from outside while it started: the next one may come up."""


class InputLostError(ActorLostError):
    """What a call was to work on is gone from the object store: whoever made it has to make it again."""


@dataclass(frozen=True)
class Call:
    """One remote call to make: `actor.method(*arguments)`."""

    actor: SupervisedActor
    method: str
    arguments: tuple[Any, ...] = ()


class SupervisedActor:
    """One named slot for an actor. Safe to use from several threads."""

    def __init__(
        self,
        name: str,
        spawn: Callable[[], Any],
        *,
        max_restarts: int,
        start_timeout_s: float,
        call_timeout_s: float,
        after_start: Callable[[Any], Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name = name
        self.call_timeout_s = call_timeout_s
        self._spawn = spawn
        self._max_restarts = max_restarts
        self._start_timeout_s = start_timeout_s
        self._after_start = after_start
        self._say = say
        self._lock = threading.Lock()
        self.num_restarts = 0
        self.heard = -math.inf
        """When its last answer was taken (`time.monotonic`): a call that waits behind others is no silence."""
        self.handle = spawn()
        self._ready = False

    def wait_ready(self) -> None:
        """Waits for the first start; ActorLostError says how long and what may be wrong.

        A process that was killed meanwhile is replaced, as later; one that its constructor ended is not.
        """
        import ray

        if self._ready:
            return
        handle = self.handle
        try:
            ray.get(handle.ping.remote(), timeout=self._start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise ActorLostError(
                f"{self.name}: not started after {self._start_timeout_s:.0f} s; the cluster may lack free CPUs or "
                f"GPUs ('morlaif plan' says what is needed), or raise cluster.start_timeout_s"
            ) from None
        except lost_errors() as error:
            if not was_killed(error):
                raise ActorLostError(f"{self.name} did not start: {one_line(error)}") from None
            self.revive(handle, one_line(error))
        self._ready = True

    def submit(
        self, method: str, arguments: Sequence[Any], num_results: int = 1
    ) -> tuple[Any, Any]:
        """(object reference, the handle that it was sent to); a list of references where there are several results."""
        handle = self.handle
        call = getattr(handle, method)
        if num_results > 1:
            call = call.options(num_returns=num_results)
        return call.remote(*arguments), handle

    def revive(self, lost: Any, cause: str) -> None:
        """Replaces the process behind `lost`, once, whoever notices first; ActorLostError beyond the budget."""
        import ray

        not_up: tuple[type[Exception], ...] = (*lost_errors(), ray.exceptions.GetTimeoutError)
        with self._lock:
            if self.handle is not lost:
                return
            ray.kill(lost)
            while True:
                if self.num_restarts >= self._max_restarts:
                    raise ActorLostError(
                        f"{self.name} died {self.num_restarts + 1} times (last: {cause}); its restart budget is "
                        f"{self._max_restarts} (policy.max_restarts); see logs/ in the run folder"
                    )
                self.num_restarts += 1
                self._say(
                    f"{self.name} was lost ({cause}); starting it again ({self.num_restarts}/{self._max_restarts})"
                )
                fresh = self._spawn()
                try:
                    ray.get(fresh.ping.remote(), timeout=self._start_timeout_s)
                    if self._after_start is not None:
                        self._after_start(fresh)
                except not_up as error:
                    ray.kill(fresh)
                    cause = one_line(error)
                    continue
                except InputLostError:  # it is sound; who makes the input again asks it again
                    self.handle = fresh
                    raise
                # Only now can another thread see it: a worker that is not up to date gets no call.
                self.handle = fresh
                return

    def stop(self) -> None:
        import ray

        ray.kill(self.handle)


def wait_all_ready(actors: Sequence[SupervisedActor]) -> None:
    """Waits for the first start of all; where one does not start, none is left behind."""
    try:
        for actor in actors:
            actor.wait_ready()
    except BaseException:
        for actor in actors:
            actor.stop()
        raise


class PendingCalls:
    """Calls under way; `results()` waits for them. A lost actor is revived and its call repeated."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = list(calls)
        self._waiting = {index: self._submit(index) for index in range(len(self._calls))}
        self._results: list[Any] = [None] * len(self._calls)

    def results(self) -> list[Any]:
        """In the order of the calls, each collected once however often this is asked.

        Raises the method's own error as it is, ActorLostError when a restart budget is used up, or InputLostError.
        """
        while self._waiting:
            for index, (reference, handle) in list(self._waiting.items()):
                done, value = _collect(self._calls[index], reference, handle)
                if done:
                    self._results[index] = value
                    del self._waiting[index]
                else:
                    self._waiting[index] = self._submit(index)
        return self._results

    def _submit(self, index: int) -> tuple[Any, Any]:
        call = self._calls[index]
        return call.actor.submit(call.method, call.arguments)


def call_all(calls: Sequence[Call]) -> list[Any]:
    """Makes all calls at once; results in order. Errors as those of `PendingCalls.results`."""
    return PendingCalls(calls).results()


def call(actor: SupervisedActor, method: str, *arguments: Any) -> Any:
    """One call, supervised."""
    return call_all([Call(actor, method, arguments)])[0]


def _collect(call: Call, reference: Any, handle: Any) -> tuple[bool, Any]:
    """(True, result), or (False, None) after the actor was revived and the call must be repeated."""
    import ray

    actor, asked = call.actor, time.monotonic()
    while True:
        left_s = max(asked, actor.heard) + actor.call_timeout_s - time.monotonic()
        try:
            value = ray.get(reference, timeout=max(left_s, 0.0))
            actor.heard = time.monotonic()
            return True, value
        except ray.exceptions.RayTaskError as error:
            actor.heard = time.monotonic()
            if input_is_lost(error):
                raise InputLostError(input_lost(actor.name, call.method)) from None
            raise cause_of(error) from None
        except ray.exceptions.GetTimeoutError:
            if max(asked, actor.heard) + actor.call_timeout_s > time.monotonic():
                continue  # it answered another call meanwhile
            actor.revive(handle, f"no answer to {call.method} in {actor.call_timeout_s:.0f} s")
        except lost_errors() as error:
            actor.revive(handle, one_line(error))
        return False, None


def lost_errors() -> tuple[type[Exception], ...]:
    """What Ray raises for a call to an actor that is gone, or whose answer is gone with its node. A kill by Ray's
    memory monitor is no RayActorError."""
    import ray

    raised = ray.exceptions
    return (
        raised.RayActorError,
        raised.OutOfMemoryError,
        raised.ActorUnschedulableError,
        raised.ObjectLostError,
    )


def input_is_lost(error: Any) -> bool:
    """Whether a method could not begin, or go on, because something in the object store is gone with its node or with
    the actor that made it."""
    import ray

    return isinstance(error.cause, ray.exceptions.ObjectLostError | ray.exceptions.RayActorError)


def input_lost(name: str, method: str) -> str:
    """The line of an InputLostError."""
    return f"{name}: what {method} needs was lost with the node or process that held it"


def was_killed(error: BaseException) -> bool:
    """Whether an actor's process ended from outside: not by its own constructor, nor for want of memory or place."""
    import ray

    return isinstance(error, ray.exceptions.RayActorError) and not error.actor_init_failed


def cause_of(error: Any) -> BaseException:
    """What a remote method raised. Ours and the system's errors as they are, so that a full disk is known as one."""
    cause = error.cause
    if isinstance(cause, MorlaifError | OSError):
        return cause
    if "No space left on device" in str(cause):  # safetensors has an error of its own
        return OSError(errno.ENOSPC, "No space left on device")
    whole: BaseException = error.as_instanceof_cause()
    return whole


def one_line(error: BaseException) -> str:
    """What a Ray error says, without its traceback."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # An error in the constructor comes with its traceback: the last line says what it was.
    said = lines[-1] if "creation task" in lines[0] else lines[0]
    return re.sub(r"^morlaif_ray\.errors\.\w+: ", "", said)[:300]


def map_over(
    actors: Sequence[SupervisedActor],
    method: str,
    items: Sequence[tuple[Any, ...]],
    on_result: Callable[[int, Any], None] | None = None,
    in_flight: int = 2,
    *,
    second_stays: bool = False,
) -> list[Any]:
    """Spreads items over interchangeable actors, each to the least loaded, at most `in_flight` per actor; results in
    item order. An actor that answers nothing for its call time-out is replaced, however busy the others are.

    second_stays: the method has two results, of which the second stays where it is: (first, reference to the second).
    """
    import ray

    results: list[Any] = [None] * len(items)
    dispatch = _Dispatch(actors, method, items, in_flight, 1 + second_stays)
    while dispatch.give_out():
        ready, _ = ray.wait(list(dispatch.pending), num_returns=1, timeout=dispatch.patience_s())
        if not ready:
            dispatch.replace_silent()
            continue
        index, actor, handle, stays = dispatch.take_back(ready[0])
        done, value = _collect(Call(actor, method, items[index]), ready[0], handle)
        if not done:
            dispatch.queue.append(index)
            continue
        results[index] = (value, *stays) if stays else value
        if on_result is not None:
            on_result(index, value)
    return results


class _Dispatch:
    """Which item is with which actor, and when each actor was last heard of."""

    def __init__(
        self,
        actors: Sequence[SupervisedActor],
        method: str,
        items: Sequence[tuple[Any, ...]],
        in_flight: int,
        num_results: int,
    ) -> None:
        self._actors = actors
        self._method = method
        self._items = items
        self._in_flight = in_flight
        self._num_results = num_results
        self._load = {id(actor): 0 for actor in actors}
        self._heard = {id(actor): time.monotonic() for actor in actors}
        self.queue = list(range(len(items)))[::-1]
        self.pending: dict[Any, tuple[int, SupervisedActor, Any, list[Any]]] = {}
        """By the reference to wait for: item, actor, handle, references to further results."""

    def give_out(self) -> bool:
        """Sends what may be sent; False where nothing is left to wait for."""
        while self.queue:
            actor = min(self._actors, key=lambda a: self._load[id(a)])
            if self._load[id(actor)] >= self._in_flight:
                break
            if not self._load[id(actor)]:
                self._heard[id(actor)] = time.monotonic()
            index = self.queue.pop()
            made, handle = actor.submit(self._method, self._items[index], self._num_results)
            first, *stays = made if self._num_results > 1 else [made]
            self.pending[first] = (index, actor, handle, stays)
            self._load[id(actor)] += 1
        return bool(self.pending)

    def take_back(self, reference: Any) -> tuple[int, SupervisedActor, Any, list[Any]]:
        taken = self.pending.pop(reference)
        actor = taken[1]
        self._load[id(actor)] -= 1
        self._heard[id(actor)] = time.monotonic()
        return taken

    def patience_s(self) -> float:
        """Until the first busy actor counts as silent."""
        busy = [a for a in self._actors if self._load[id(a)]]
        deadline = min(self._heard[id(a)] + a.call_timeout_s for a in busy)
        return max(deadline - time.monotonic(), 0.0)

    def replace_silent(self) -> None:
        """Takes back what silent actors hold, and starts these again."""
        now = time.monotonic()
        busy = [a for a in self._actors if self._load[id(a)]]
        for actor in [a for a in busy if self._heard[id(a)] + a.call_timeout_s <= now]:
            lost = [ref for ref, taken in self.pending.items() if taken[1] is actor]
            taken = [self.take_back(reference) for reference in lost]
            self.queue.extend(sorted((index for index, *_ in taken), reverse=True))
            for handle in {id(handle): handle for _, _, handle, _ in taken}.values():
                cause = f"no answer to {self._method} in {actor.call_timeout_s:.0f} s"
                actor.revive(handle, cause)
