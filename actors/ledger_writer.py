"""The one process that opens the ledger, on the driver's own machine.

A plain class around `morlaif_ray.feedback.ledger.Ledger`; `spawn_ledger_writer` gives it a process. The ledger opens
with the first call and not in the constructor, so that its error reaches the driver as it is. Every method may safely
run twice, so Ray may restart the actor and repeat the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from morlaif_ray.feedback.intents import Intent, Settled
from morlaif_ray.feedback.ledger import FailureRow, Ledger, LedgerRow, StoredAnswer

if TYPE_CHECKING:
    import ray.actor


@dataclass(frozen=True, slots=True)
class LedgerRecipe:
    """Judge and template behind the rows that this run appends."""

    recipe: str
    judge: str
    """Canonical JSON of the judge's identity; holds no key."""
    template: str


class LedgerWriter:
    """`run` names the run, so that a writer which was restarted knows which requests are still in flight."""

    def __init__(
        self, path: Path, recipe: LedgerRecipe, *, lock_wait_s: float = 10.0, run: str = ""
    ) -> None:
        self._path = path
        self._recipe = recipe
        self._lock_wait_s = lock_wait_s
        self._run = run
        self._opened: Ledger | None = None

    @property
    def _ledger(self) -> Ledger:
        if self._opened is None:
            self._opened = Ledger(self._path, lock_wait_s=self._lock_wait_s, run=self._run)
            self._opened.register(self._recipe.recipe, self._recipe.judge, self._recipe.template)
        return self._opened

    def open(self) -> int:
        """Takes the lock; number of answers recorded so far. FeedbackError where another run holds the ledger."""
        return self._ledger.num_answers()

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, StoredAnswer]:
        return self._ledger.lookup(keys)

    def recorded(self, keys: Sequence[bytes]) -> list[bool]:
        return self._ledger.recorded(keys)

    def announce(self, intents: Sequence[Intent]) -> None:
        self._ledger.announce(intents)

    def append(
        self,
        rows: Sequence[LedgerRow],
        failures: Sequence[FailureRow],
        settled: Sequence[Settled] = (),
    ) -> None:
        self._ledger.append(self._recipe.recipe, rows, failures, settled)

    def spent_usd(self, in_flight: bool = False) -> float:
        """What a budget counts with: requests whose outcome nobody knows included.

        Args:
            in_flight: also what is announced. For a limiter that was restarted: the one before took these estimates,
                and the workers will give back what they were too high.
        """
        return self._ledger.possibly_spent_usd + (self._ledger.open_usd if in_flight else 0.0)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def spawn_ledger_writer(
    path: Path, recipe: LedgerRecipe, *, name: str, max_restarts: int, lock_wait_s: float
) -> ray.actor.ActorHandle:
    """One per run. Pinned to the driver's node, where the path is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(LedgerWriter)
    return remote.options(
        name=name,
        num_cpus=0,
        max_restarts=max_restarts,
        max_task_retries=max_restarts,
        scheduling_strategy=here,
    ).remote(path, recipe, lock_wait_s=lock_wait_s, run=name)
