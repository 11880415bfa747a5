"""Which prompts a PPO step sees: a pure function of (seed, step), the same for every arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.context import JobContext
from morlaif_ray.artifacts import read_records
from morlaif_ray.errors import DataError
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import GenerationRequest, Prompt


class PromptSchedule:
    """Prompts of split `policy`; every epoch is a fresh seeded order, and a step takes the next ones.

    A step has `batch_size` rows: each prompt stands `samples_per_prompt` times in a row.
    """

    def __init__(self, context: JobContext) -> None:
        prompts = read_records(context.path("0_sft", "prompts.parquet"), Prompt)
        self.prompts = [prompt.text for prompt in prompts if prompt.split == "policy"]
        if not self.prompts:
            raise DataError("no prompt in the split policy; raise data.splits.policy")
        policy = context.config.policy
        self._repeats = policy.samples_per_prompt
        self._num = policy.batch_size // policy.samples_per_prompt
        self._seed = context.config.seed

    def prompts_of(self, step: int) -> list[str]:
        """The prompts of one step, `batch_size` of them."""
        chosen: list[str] = []
        for position in range(step * self._num, (step + 1) * self._num):
            epoch, place = divmod(position, len(self.prompts))
            chosen += [self.prompts[int(self._order(epoch)[place])]] * self._repeats
        return chosen

    def requests(self, prompts: Sequence[str], what: str, step: int) -> list[GenerationRequest]:
        """One sample of each prompt, seeded by what it is for, step and place."""
        return [
            GenerationRequest(prompt, derive_seed(self._seed, what, step, index))
            for index, prompt in enumerate(prompts)
        ]

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        seed = derive_seed(self._seed, "policy prompts", epoch)
        return np.random.default_rng(seed).permutation(len(self.prompts))
