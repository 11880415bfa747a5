"""Where the batch of a step comes from: sampled now, or one step ahead while the learner worked.

    staleness 0    sample(t), score(t), update(t), refresh, sample(t+1) ...
    staleness 1    update(t) beside sample(t+1), score(t+1); refresh; update(t+1) beside sample(t+2) ...

With staleness 1 the batch of step t is sampled from the weights after step t-2, that is of version t-1, the first batch
from version 0. It is finished before the weights change, so a response never mixes two versions; the learner corrects
by importance weights. What is in flight at a checkpoint is written beside it: a resumed run trains on the same bits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from actors.stored_rollouts import StoredRollouts
from jobs.arm_scoring import ScoredBatch
from morlaif_ray.errors import ArtifactError
from morlaif_ray.rl.in_flight import read_rollouts, write_rollouts
from morlaif_ray.types import FloatArray, RolloutBatch

Batch = tuple[RolloutBatch | StoredRollouts, ScoredBatch]
_SCORES = ("reward_B", "raw_BK", "normalised_BK")


class RolloutsAhead:
    """The batches of one arm, in order. One background thread at most."""

    def __init__(
        self,
        make: Callable[[int], Batch],
        staleness: int,
        folder: Path,
        num_kept: int,
        write: Callable[[Path, Batch], None] | None = None,
    ) -> None:
        """`write`: who writes a batch in flight to disk; None: this process, which must hold all of it."""
        self._make = make
        self._write = write or save_in_flight
        self._staleness = staleness
        self._folder = folder
        self._num_kept = num_kept
        self._next: tuple[int, Future[Batch]] | None = None
        self.wait_s = 0.0
        """Seconds that the learner waited for the responses of its last step, before and after its update."""

    def take(self, step: int) -> Batch:
        """The batch of this step."""
        started = time.monotonic()
        if self._next is not None and self._next[0] == step:
            batch = self._next[1].result()
            self._next = None
        elif self._staleness and step:
            batch = load_in_flight(self._path(step))
        else:
            batch = self._make(step)
        self.wait_s = time.monotonic() - started
        age = step - batch[0].policy_version
        assert 0 <= age <= self._staleness, f"step {step}: responses are {age} versions old"
        return batch

    def begin(self, step: int) -> None:
        """Starts to sample this step's batch beside the caller, where staleness allows."""
        if not self._staleness:
            return
        future: Future[Batch] = Future()

        def work() -> None:
            try:
                future.set_result(self._make(step))
            except BaseException as error:  # noqa: BLE001 - raised where the result is taken
                future.set_exception(error)

        # A daemon: a job that ends with an error does not wait for responses that nobody will read.
        threading.Thread(target=work, name=f"rollouts of step {step}", daemon=True).start()
        self._next = (step, future)

    def wait(self) -> bool:
        """Until no response is being sampled: only then may the weights change. Whether they were ready at once."""
        started = time.monotonic()
        ready = self._next is None or self._next[1].done()
        if self._next is not None:
            self._next[1].exception()  # raised by `take`
        self.wait_s += time.monotonic() - started
        return ready

    def drop(self) -> None:
        """Forgets the batch ahead: the learner went back, and the batch that it needs is on disk."""
        self.wait()
        self._next = None

    def save(self, step: int) -> None:
        """Writes the batch ahead, before the learner's checkpoint of the same step."""
        if self._next is None:
            return
        assert self._next[0] == step, f"a batch of step {self._next[0]} at a checkpoint of {step}"
        self._write(self._path(step), self._next[1].result())
        known = sorted(self._folder.glob("*.npz"), key=lambda path: int(path.stem))
        # The best checkpoint is kept however old it is: its batch must be there to go on from it.
        older = [path.suffix[1:] for path in self._folder.parent.glob("checkpoint.*")]
        kept = {int(step) for step in older if step.isdigit()}
        for path in known[: -self._num_kept]:
            if int(path.stem) not in kept:
                path.unlink()

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.npz"


def save_in_flight(path: Path, batch: Batch) -> None:
    """Publishes a scored batch as one file (arrays and JSON, no pickle)."""
    write_rollouts(path, batch[0], score_arrays(batch[1]))


def score_arrays(scored: ScoredBatch) -> dict[str, FloatArray]:
    """What is written of a scored batch beside its responses."""
    return {name: getattr(scored, name) for name in _SCORES}


def load_in_flight(path: Path) -> Batch:
    """What `save_in_flight` wrote; ArtifactError where it is missing or damaged."""
    responses, scores = read_rollouts(path)
    try:
        return responses, ScoredBatch(**{name: scores[name] for name in _SCORES})
    except KeyError as error:
        raise ArtifactError(
            f"{path}: damaged ({error}); remove {path.parent.parent} to begin this arm again"
        ) from None
