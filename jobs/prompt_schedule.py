"""Which prompts a PPO step sees: a pure function of (seed, step), the same for every arm."""

from __future__ import annotations

from typing import Any

import numpy as np

from jobs.context import JobContext
from morlaif_ray.artifacts import read_records
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import Prompt


class PromptSchedule:
    """Prompts of split `policy`; every epoch is a fresh seeded order, and a step takes the next `batch_size`."""

    def __init__(self, context: JobContext) -> None:
        prompts = read_records(context.path("0_sft", "prompts.parquet"), Prompt)
        self._prompts = [prompt.text for prompt in prompts if prompt.split == "policy"]
        self._batch_size = context.config.policy.batch_size
        self._seed = context.config.seed

    def prompts_of(self, step: int) -> list[str]:
        """The prompts of one step, `batch_size` of them."""
        chosen = []
        for position in range(step * self._batch_size, (step + 1) * self._batch_size):
            epoch, place = divmod(position, len(self._prompts))
            chosen.append(self._prompts[int(self._order(epoch)[place])])
        return chosen

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        seed = derive_seed(self._seed, "policy prompts", epoch)
        return np.random.default_rng(seed).permutation(len(self._prompts))
