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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.allocation import keep_freed_memory
from actors.learner_ranks import OtherRanks
from actors.placement import learner_cpus
from actors.spawning import spawn
from actors.stored_rollouts import StoredRollouts, whole
from actors.weight_outlet import WeightOutlet
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import MorlaifError
from morlaif_ray.rl.in_flight import write_rollouts
from morlaif_ray.rl.learner import PPOLearner
from morlaif_ray.rl.ranks import Ranks, join_ranks, leave_ranks
from morlaif_ray.rl.weight_broadcast import Announcement, Rendezvous
from morlaif_ray.rl.weight_transfer import WeightBucket, in_buckets
from morlaif_ray.types import Float32Array, FloatArray, RolloutBatch


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
        keep_freed_memory()
        set_threads(settings.config.learner_threads)
        self._settings = settings
        self._rank = rank
        self._address = address
        self._others = OtherRanks()
        self._outlet = WeightOutlet()
        self._made: PPOLearner | None = None
        self._failure: Exception | None = None

    def begin(self) -> None:
        """Forms the group and loads this rank's part. What fails is raised by whatever is asked of rank 0 next.

        Not in the constructor: while rank 0 is in its own, Ray 2.60 does not tell it of a rank that was killed in its.
        """
        try:
            self._begin()
        except Exception as error:
            self._failure = error
            if self._rank:
                raise  # rank 0 waits for this call

    def _begin(self) -> None:
        settings, size = self._settings, self._settings.config.learner_ranks
        if size == 1:
            self._made = self._make(Ranks())
            return
        if self._rank == 0:
            self._address = free_address()
            self._others = OtherRanks(
                [_spawn(settings, rank, self._address) for rank in range(1, size)]
            )
        timeout_s = settings.config.call_timeout_s
        self._others.begin(
            lambda: join_ranks(self._rank, size, self._address, settings.device, timeout_s),
            self._adopt,
            timeout_s,
        )

    def _adopt(self, ranks: Ranks) -> None:
        self._made = self._make(ranks)

    @property
    def _learner(self) -> PPOLearner:
        if self._failure is not None:
            raise self._failure
        assert self._made is not None, "begin comes first"
        return self._made

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
        batch: RolloutBatch | StoredRollouts,
        reward_B: FloatArray,
        scores: Mapping[str, FloatArray] | None = None,
    ) -> dict[str, float]:
        """One PPO step; the fields of `UpdateMetrics`. `scores` are written beside samples that cannot be learned.

        Of a stored batch every rank fetches the arrays itself.
        """
        timeout_s = self._settings.config.call_timeout_s
        metrics = self._together(
            "update",
            lambda: self._learner.update(whole(batch, timeout_s), reward_B, scores),
            batch,
            reward_B,
            scores,
        )
        return dataclasses.asdict(metrics)

    def write_rollouts(
        self, path: Path, batch: RolloutBatch | StoredRollouts, scores: Mapping[str, FloatArray]
    ) -> None:
        """Writes a batch in flight beside the checkpoint, so that its arrays need not pass the driver for that."""
        write_rollouts(path, whole(batch, self._settings.config.call_timeout_s), scores)

    def logprobs(self, batch: RolloutBatch) -> Float32Array:
        """Log-probabilities [B, T] of the batch's response tokens under the current policy; 0 beyond the length."""
        if not self._settings.config.fsdp:
            return self._learner.logprobs(batch)
        made: Float32Array = self._together(
            "logprobs", lambda: self._learner.logprobs(batch), batch
        )
        return made

    def weights(self) -> dict[str, Any]:
        """What the rollout workers need: all weights, or with LoRA the packed adapters; never passes the driver."""
        if not self._settings.config.fsdp:
            return self._learner.policy.sent_weights()
        made: dict[str, Any] = self._together("gather_weights", self._learner.policy.sent_weights)
        return made

    def gather_weights(self) -> None:
        """This rank's part in rank 0's `weights`; the result stays there."""
        self._learner.policy.help_send()

    def weight_buckets(self, max_bytes: int, version: int | None = None) -> Iterator[WeightBucket]:
        """The same weights in pieces of at most `max_bytes`, each with its checksum; for `num_returns="streaming"`.

        None at all where `version` is given and another number of steps is done.
        """
        step, base = self._learner.step, self._learner.policy.base_checksum
        if version in (None, step):
            yield from in_buckets(self.weights(), step, max_bytes, base)

    def transfer_address(self) -> str:
        """host:port on this node, for a group with the engines."""
        return free_address()

    def open_transfer(self, where: Rendezvous) -> str | Exception:
        """Forms the group; the GPU of this process where that matters ('' elsewhere), or what failed."""
        return self._outlet.open(where)

    def offer_weights(self) -> Announcement | Exception:
        """The message that makes engines ready for `send_weights`, or what failed."""
        return self._outlet.offer(self._learner.policy, self._learner.step)

    def send_weights(self, message: Announcement) -> Exception | None:
        """Sends all weights to the engines that were told; what failed, or None."""
        policy = self._learner.policy
        if not self._settings.config.fsdp:
            return self._outlet.send(message, policy)
        sent: Exception | None = self._together(
            "gather_weights", lambda: self._outlet.send(message, policy)
        )
        return sent

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
    handle = _spawn(settings, 0, "")
    handle.begin.remote()  # calls are answered in order: whatever is asked next finds it done
    return handle
