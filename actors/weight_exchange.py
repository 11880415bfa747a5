"""Weights from the learner straight into the engines: who is in the group, one message, and what a failure leaves.

    failure = exchange.send(learner, version, answer)     None: every engine holds the version, verified
                                                          else the cause: load the weights another way

The group is the learner and all engines. It is formed before the first transfer, and anew where one of them is another
process than before, or after a transfer that failed. Which engine lives and which is started again stays the business
of its `SupervisedActor`; a worker that does not come back from a transfer is killed for it to notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from actors.supervision import (
    InputLostError,
    SupervisedActor,
    cause_of,
    lost_errors,
    one_line,
)
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ConfigError
from morlaif_ray.rl.weight_broadcast import Announcement, Rendezvous

Answer = Callable[[str, Any], Any]
"""(name of a method of the learner, reference to its result) -> the result; it sees to a learner that is lost."""
GRACE_S = 15.0
"""What a worker gets to say that it failed, beyond the two time-outs (for the store, for the group) that it waits."""
MOST_FAILURES = 2
"""One after the other; what failed so often is not tried again in this run."""


class WeightExchange:
    """Of one rollout pool. Used by one thread, while nothing is being sampled."""

    def __init__(self, workers: Sequence[SupervisedActor], policy: PolicyConfig) -> None:
        self._workers = workers
        self._policy = policy
        self._members: list[Any] = []
        self._failures = 0

    @property
    def is_given_up(self) -> bool:
        """Whether it has failed too often to be worth its time-outs."""
        return self._failures >= MOST_FAILURES

    def send(self, learner: Any, version: int, answer: Answer) -> str | None:
        """Why not every engine holds the learner's weights, in one line; None where all do."""
        members = [learner, *(worker.handle for worker in self._workers)]
        # Until all is well there is no group, also where the learner is lost on the way.
        before, self._members = self._members, []
        _, failure = self._collect(members[1:], "ping", [h.ping.remote() for h in members[1:]])
        if failure is None and not _same(before, members):
            failure = self._form(members, answer)
        if failure is None:
            failure = self._transfer(members, version, answer)
        if failure is None:
            self._members, self._failures = members, 0
            return None
        self._failures += 1
        if self.is_given_up:
            failure += f"; as all will from now on, after {MOST_FAILURES} failures in a row"
        return failure

    def _form(self, members: Sequence[Any], answer: Answer) -> str | None:
        learner, *workers = members
        address = answer("transfer_address", learner.transfer_address.remote())
        slices = self._policy.engine_slices
        size = 1 + slices * len(workers)

        def at(first_rank: int) -> Rendezvous:
            policy = self._policy
            return Rendezvous(
                policy.direct_transfer or "",
                address,
                first_rank,
                size,
                policy.weight_bucket_mb << 20,
                policy.weight_transfer_timeout_s,
            )

        joining = [w.join_transfer.remote(at(1 + i * slices)) for i, w in enumerate(workers)]
        opened: str | Exception = answer("open_transfer", learner.open_transfer.remote(at(0)))
        gpus, failure = self._collect(workers, "join_transfer", joining)
        if isinstance(opened, Exception):
            return _both(opened, failure)
        if failure is None and any(gpu != opened for gpu in gpus):
            raise ConfigError(
                f"policy.weight_transfer is {self._policy.weight_transfer}, and the learner and the rollout workers "
                f"are not on the same GPU; write weight_transfer: nccl with a whole GPU each, or object_store"
            )
        return failure

    def _transfer(self, members: Sequence[Any], version: int, answer: Answer) -> str | None:
        learner, *workers = members
        message: Announcement | Exception = answer("offer_weights", learner.offer_weights.remote())
        if isinstance(message, Exception):
            return one_line(message)
        assert message.version == version, f"the learner is at step {message.version}"
        receiving = [worker.receive_weights.remote(message) for worker in workers]
        sent: Exception | None = answer("send_weights", learner.send_weights.remote(message))
        held, failure = self._collect(workers, "receive_weights", receiving)
        if sent is not None:
            return _both(sent, failure)
        assert failure is not None or set(held) == {version}, f"workers hold versions {held}"
        return failure

    def _collect(
        self, handles: Sequence[Any], method: str, references: Sequence[Any]
    ) -> tuple[list[Any], str | None]:
        """(results, first failure); a worker that gives no answer is killed."""
        import ray

        timeout_s = 2 * self._policy.weight_transfer_timeout_s + GRACE_S
        ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
        results, failures = [], []
        for worker, handle, reference in zip(self._workers, handles, references, strict=True):
            try:
                results.append(ray.get(reference, timeout=0))
            except ray.exceptions.GetTimeoutError:
                failures.append(f"{worker.name}: no answer to {method} in {timeout_s:.0f} s")
                ray.kill(handle)
            except ray.exceptions.RayTaskError as error:
                failures.append(f"{worker.name}: {one_line(cause_of(error))}")
            except lost_errors() as error:
                failures.append(f"{worker.name}: {one_line(error)}")
        return results, failures[0] if failures else None


def fetch_buckets(learner: Any, max_bytes: int, version: int, timeout_s: float) -> list[Any]:
    """References to buckets of the learner's weights, for a worker that was started after a direct transfer.

    InputLostError where the learner is gone, busy, or has gone on to another version: these weights exist no more.
    """
    import ray

    made = learner.weight_buckets.options(num_returns="streaming").remote(max_bytes, version)
    try:
        ray.get(learner.ping.remote(), timeout=timeout_s)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise InputLostError(
            f"weights of version {version} cannot be had again ({one_line(error)})"
        ) from None
    buckets = list(made)
    if not buckets:
        raise InputLostError(
            f"weights of version {version} exist no more: the learner has gone on to the next step"
        )
    return buckets


def _both(learner: Exception, workers: str | None) -> str:
    """The learner often only waits in vain for a worker that knows more."""
    return one_line(learner) if workers is None else f"{one_line(learner)}; {workers}"


def _same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
