"""The PPO learner with a process. Restores its own checkpoint when it starts, so a restarted learner is up to date."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.placement import LEARNER_CPUS
from actors.spawning import spawn
from actors.training import set_single_thread
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.rl.learner import PPOLearner
from morlaif_ray.rl.weight_transfer import WeightBucket, in_buckets
from morlaif_ray.types import Float32Array, FloatArray, RolloutBatch


class PPOLearnerActor:
    """Plain class; `spawn_ppo_learner` gives it a process."""

    def __init__(
        self,
        model_path: str,
        config: PolicyConfig,
        seed: int,
        dtype: str,
        device: str,
        checkpoint_dir: str,
    ) -> None:
        set_single_thread()
        self._learner = PPOLearner(model_path, config, seed=seed, dtype=dtype, device=device)
        self._checkpoint = Path(checkpoint_dir)
        self._learner.load_checkpoint(self._checkpoint)

    def ping(self) -> int:
        """Number of steps done."""
        return self._learner.step

    def update(self, batch: RolloutBatch, reward_B: FloatArray) -> dict[str, float]:
        """One PPO step; the fields of `UpdateMetrics`."""
        return dataclasses.asdict(self._learner.update(batch, reward_B))

    def weights(self) -> dict[str, Any]:
        """The policy's weights for the rollout workers; stays in the object store, never passes the driver."""
        return self._learner.weights()

    def weight_buckets(self, max_bytes: int) -> Iterator[WeightBucket]:
        """The same weights in pieces of at most `max_bytes`, each with its checksum; for `num_returns="streaming"`."""
        yield from in_buckets(self.weights(), self._learner.step, max_bytes)

    def logprobs(self, batch: RolloutBatch) -> Float32Array:
        """Log-probabilities [B, T] of the batch's response tokens under the current policy; 0 beyond the length."""
        return self._learner.logprobs(batch)

    def save_checkpoint(self) -> int:
        """Publishes the whole training state; returns the number of steps it holds."""
        self._learner.save_checkpoint(self._checkpoint)
        return self._learner.step

    def save_model(self, folder: str) -> None:
        self._learner.save(Path(folder))


def spawn_ppo_learner(
    model_path: str,
    config: PolicyConfig,
    *,
    seed: int,
    dtype: str,
    checkpoint_dir: Path,
) -> Any:
    """An actor handle of a `PPOLearnerActor` with the configured GPUs."""
    gpus = config.learner_gpus_per_rank
    device = "cuda" if gpus else "cpu"
    return spawn(
        PPOLearnerActor,
        model_path,
        config,
        seed,
        dtype,
        device,
        str(checkpoint_dir),
        num_cpus=LEARNER_CPUS,
        num_gpus=gpus,
    )
