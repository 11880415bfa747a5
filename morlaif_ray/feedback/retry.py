"""What to do after a failed attempt. A pure decision: no clock, no randomness of its own, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from morlaif_ray.feedback.client import AttemptError, AttemptKind

TRANSIENT: frozenset[AttemptKind] = frozenset(
    {"rate_limit", "server", "timeout", "connection", "malformed"}
)
FATAL: frozenset[AttemptKind] = frozenset({"auth", "not_found", "quota"})
"""Every further question would fail the same way: stop at once, in one line."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    max_attempts: int
    """Attempts per question and round, the first included."""
    base_wait_s: float = 0.5
    max_wait_s: float = 60.0
    """Longest wait that we choose ourselves; a provider's Retry-After may be longer."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Ask again after `wait_s`; `everyone` where the whole cluster should hold back (the provider said so)."""

    wait_s: float
    everyone: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """This question fails; the others go on."""

    reason: str


@dataclass(frozen=True, slots=True)
class Abort:
    """Nothing can succeed; the whole stage ends with this message."""

    message: str


def decide(
    error: AttemptError, attempt: int, policy: RetryPolicy, jitter: float
) -> Retry | GiveUp | Abort:
    """The next step after attempt number `attempt` (from 1) failed.

    Args:
        jitter: a number in [0, 1) from the caller; waits are spread over [half, full] of the exponential step, so
            that workers which failed together do not return together.
    """
    if error.kind in FATAL:
        return Abort(error.message)
    if error.kind not in TRANSIENT:
        return GiveUp(str(error))
    if attempt >= policy.max_attempts:
        return GiveUp(f"{error} (after {attempt} attempt{'s' if attempt != 1 else ''})")
    step_s = min(policy.max_wait_s, policy.base_wait_s * 2.0 ** (attempt - 1))
    wait_s = step_s * (0.5 + 0.5 * jitter)
    if error.retry_after_s is not None:
        # The provider's word counts as a lower bound, plus a little spread.
        wait_s = max(error.retry_after_s, 0.0) + 0.1 * wait_s
    return Retry(wait_s, everyone=error.kind == "rate_limit" and error.retry_after_s is not None)
