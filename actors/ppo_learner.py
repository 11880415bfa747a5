"""The PPO learner with its processes: one rank, or a group of ranks behind rank 0.

    handle = spawn_ppo_learner(...)        # rank 0; starts ranks 1..N-1 itself and owns them
    handle.update.remote(batch, reward_B)  # every rank computes, rank 0 answers

Callers know rank 0 alone, so N ranks are used, waited for and killed like one. A group lives and dies together: where
a rank is lost, rank 0 ends itself, Ray ends the others with their owner, and the caller starts a new group at
the last checkpoint. An error that all ranks meet alike (a loss that is not finite) is raised as it is.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.placement import learner_cpus
from actors.spawning import spawn
from actors.supervision import one_line
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ActorLostError, MorlaifError
from morlaif_ray.rl.learner import PPOLearner
from morlaif_ray.rl.ranks import Ranks, join_ranks, leave_ranks
from morlaif_ray.rl.weight_transfer import WeightBucket, in_buckets
from morlaif_ray.types import Float32Array, FloatArray, RolloutBatch

WATCH_S = 0.2
"""How often rank 0, while it waits for the group to form, looks whether the others still live."""
CAUSE_TIMEOUT_S = 5.0
"""How long a failing rank 0 waits for the other ranks' own causes."""


@dataclass(frozen=True)
class LearnerSettings:
    """What every rank of a learner is made from."""

    model_path: str
    config: PolicyConfig
    seed: int
    dtype: str
    checkpoint_dir: Path
    num_steps: int | None = None
    """Length of the learning-rate schedule; None: `config.num_steps`."""

    @property
    def device(self) -> str:
        return "cuda" if self.config.learner_gpus_per_rank else "cpu"


class PPOLearnerActor:
    """One rank. Plain class; `spawn_ppo_learner` gives it a process."""

    def __init__(self, settings: LearnerSettings, rank: int = 0, address: str = "") -> None:
        """`address`: host:port of rank 0's rendezvous where there are several ranks."""
        set_threads(settings.config.learner_threads)
        self._settings = settings
        self._others = OtherRanks()
        size = settings.config.learner_ranks
        self._learner: PPOLearner
        if size == 1:
            self._learner = self._make(Ranks())
            return
        if rank == 0:
            address = free_address()
            self._others = OtherRanks.start(settings, address)
        timeout_s = settings.config.call_timeout_s
        self._others.begin(
            lambda: join_ranks(rank, size, address, settings.device, timeout_s),
            self._adopt,
            timeout_s,
        )

    def _adopt(self, ranks: Ranks) -> None:
        self._learner = self._make(ranks)

    def _make(self, ranks: Ranks) -> PPOLearner:
        settings = self._settings
        learner = PPOLearner(
            settings.model_path,
            settings.config,
            seed=settings.seed,
            dtype=settings.dtype,
            device=settings.device,
            num_steps=settings.num_steps,
            ranks=ranks,
            failure_dir=settings.checkpoint_dir.parent,
        )
        learner.load_checkpoint(settings.checkpoint_dir)
        return learner

    def ping(self) -> int:
        """Number of steps done."""
        return self._learner.step

    def pids(self) -> list[int]:
        """Process ids of all ranks, rank 0 first."""
        return [os.getpid(), *self._others.pids(self._settings.config.call_timeout_s)]

    def notes(self) -> list[str]:
        """Lines for a person since the last call, such as a damaged checkpoint that was passed over."""
        notes, self._learner.notes = self._learner.notes, []
        return notes

    def update(
        self,
        batch: RolloutBatch,
        reward_B: FloatArray,
        scores: Mapping[str, FloatArray] | None = None,
    ) -> dict[str, float]:
        """One PPO step; the fields of `UpdateMetrics`. `scores` are written beside samples that cannot be learned."""
        metrics = self._together(
            "update", lambda: self._learner.update(batch, reward_B, scores), batch, reward_B, scores
        )
        return dataclasses.asdict(metrics)

    def logprobs(self, batch: RolloutBatch) -> Float32Array:
        """Log-probabilities [B, T] of the batch's response tokens under the current policy; 0 beyond the length."""
        if not self._settings.config.fsdp:
            return self._learner.logprobs(batch)
        made: Float32Array = self._together(
            "logprobs", lambda: self._learner.logprobs(batch), batch
        )
        return made

    def weights(self) -> dict[str, Any]:
        """The policy's weights for the rollout workers; stays in the object store, never passes the driver."""
        if not self._settings.config.fsdp:
            return self._learner.weights()
        made: dict[str, Any] = self._together("gather_weights", self._learner.weights)
        return made

    def gather_weights(self) -> None:
        """This rank's part in rank 0's `weights`; the result stays there."""
        self._learner.help_gather()

    def weight_buckets(self, max_bytes: int) -> Iterator[WeightBucket]:
        """The same weights in pieces of at most `max_bytes`, each with its checksum; for `num_returns="streaming"`."""
        yield from in_buckets(self.weights(), self._learner.step, max_bytes)

    def loop_state(self) -> dict[str, Any]:
        """What the loop had given to `save_checkpoint` for the step at which this learner began; {} at the start."""
        return self._learner.loop_state

    def save_checkpoint(self, loop_state: Mapping[str, Any] | None = None) -> int:
        """Publishes the whole training state, the loop's own beside it; returns the number of steps it holds."""
        folder = self._settings.checkpoint_dir
        self._together(
            "save_checkpoint",
            lambda: self._learner.save_checkpoint(folder, loop_state),
            loop_state,
        )
        return self._learner.step

    def save_model(self, folder: str) -> None:
        """Writes the policy as a Hugging Face folder."""
        self._together("save_model", lambda: self._learner.save(Path(folder)), folder)

    def _together(self, method: str, work: Callable[[], Any], *arguments: Any) -> Any:
        """This rank's work beside the same call on the other ranks."""
        if self._settings.config.learner_ranks == 1:
            return work()
        pending = self._others.call(method, *arguments)
        try:
            result = work()
        except MorlaifError:
            raise  # the same on every rank
        except Exception as error:  # whatever it was, this rank is out of step with the others
            leave_ranks()
            self._others.end(pending, error)
            raise
        self._others.finish(pending, self._settings.config.call_timeout_s)
        return result


class OtherRanks:
    """Rank 0's view of ranks 1..N-1; empty on those, and where there is one rank."""

    def __init__(self, handles: Sequence[Any] = ()) -> None:
        self._handles = list(handles)

    @classmethod
    def start(cls, settings: LearnerSettings, address: str) -> OtherRanks:
        return cls(
            [_spawn(settings, rank, address) for rank in range(1, settings.config.learner_ranks)]
        )

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
        """Joins the group, then makes this rank. ActorLostError as soon as another rank is seen to be lost.

        A rank that is lost before it joined leaves the others waiting for it inside `join`, up to the call time-out:
        so rank 0 joins in a thread and looks after the others meanwhile.
        """
        starting = [handle.ping.remote() for handle in self._handles]
        try:
            make(self._join(join, starting))
        except MorlaifError:
            raise  # the same on every rank, or a rank that is lost
        except Exception as error:
            leave_ranks()
            causes = self._causes(starting)
            if not causes:
                raise
            raise ActorLostError(_lost([f"rank 0: {_first_line(error)}", *causes])) from None
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
                raise ActorLostError(_lost([f"rank {rank}: {one_line(error)}"])) from None
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
        causes = [f"rank 0: {_first_line(error)}", *self._causes(pending)]
        print(_lost(causes), file=sys.stderr, flush=True)
        os._exit(1)

    def _causes(self, pending: Sequence[Any]) -> list[str]:
        import ray

        causes = []
        deadline = time.monotonic() + CAUSE_TIMEOUT_S
        for rank, reference in enumerate(pending, start=1):
            try:
                ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                causes.append(f"rank {rank}: {_first_line(error)}")
        return causes


def set_threads(num_threads: int) -> None:
    """torch's threads on CPU; a GPU's process keeps what torch chose."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(num_threads)


def free_address() -> str:
    """host:port for the rendezvous on this node: loopback where Ray has one node, else this node's address."""
    import ray

    host = "127.0.0.1"
    if len([node for node in ray.nodes() if node["Alive"]]) > 1:
        host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def _lost(causes: Sequence[str]) -> str:
    return f"PPO learner: a rank was lost ({'; '.join(causes)})"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _spawn(settings: LearnerSettings, rank: int, address: str) -> Any:
    config = settings.config
    return spawn(
        PPOLearnerActor,
        settings,
        rank,
        address,
        num_cpus=learner_cpus(config),
        num_gpus=config.learner_gpus_per_rank,
    )


def spawn_ppo_learner(
    model_path: str,
    config: PolicyConfig,
    *,
    seed: int,
    dtype: str,
    checkpoint_dir: Path,
    num_steps: int | None = None,
) -> Any:
    """An actor handle of a learner with the configured ranks and GPUs: rank 0 of a `PPOLearnerActor` group."""
    settings = LearnerSettings(model_path, config, seed, dtype, checkpoint_dir, num_steps)
    return _spawn(settings, 0, "")
