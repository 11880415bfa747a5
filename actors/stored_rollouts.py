"""A rollout batch whose arrays stay in the object store: the driver holds texts, lengths and references.

    rollout worker   told, arrays = split(batch)     two results of one call; the caller owns both
    driver           StoredRollouts.join(...)        never the tokens or log-probabilities
    learner          stored.fetch(timeout_s)         a RolloutBatch, the same bits as if it had travelled whole

The caller owns the arrays, so they outlive the worker that made them. They are freed with the last reference, when the
driver drops the batch of a step. Results below Ray's limit (100 kB) travel inside the reply instead of the store.
Legend: B responses, L sequence tokens, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from morlaif_ray.types import BoolArray, Float32Array, IntArray, RolloutBatch

Arrays = tuple[IntArray, Float32Array]
"""`tokens_BL` and `logprobs_BT` of a part."""


@dataclass(frozen=True)
class Told:
    """What the driver hears of a part at once."""

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    prompt_lengths_B: IntArray
    response_lengths_B: IntArray
    truncated_B: BoolArray
    policy_version: int

    def __len__(self) -> int:
        return len(self.prompts)


def split(batch: RolloutBatch) -> tuple[Told, Arrays]:
    """A batch as what is told of it and what is stored of it."""
    told = Told(
        batch.prompts,
        batch.responses,
        batch.prompt_lengths_B,
        batch.response_lengths_B,
        batch.truncated_B,
        batch.policy_version,
    )
    return told, (batch.tokens_BL, batch.logprobs_BT)


@dataclass(frozen=True)
class StoredRollouts(Told):
    """A whole batch; rows in the order of the parts. Fields as in `RolloutBatch`."""

    parts: tuple[Any, ...]
    """References to each part's `Arrays`."""

    @classmethod
    def join(cls, parts: Sequence[tuple[Told, Any]]) -> StoredRollouts:
        """Parts of one policy version, each with the reference to its arrays."""
        told = [part for part, _ in parts]
        versions = {part.policy_version for part in told}
        assert len(versions) == 1, f"batches of several policy versions: {sorted(versions)}"
        return cls(
            prompts=tuple(text for part in told for text in part.prompts),
            responses=tuple(text for part in told for text in part.responses),
            prompt_lengths_B=np.concatenate([part.prompt_lengths_B for part in told]),
            response_lengths_B=np.concatenate([part.response_lengths_B for part in told]),
            truncated_B=np.concatenate([part.truncated_B for part in told]),
            policy_version=told[0].policy_version,
            parts=tuple(reference for _, reference in parts),
        )

    def fetch(self, timeout_s: float) -> RolloutBatch:
        """The batch with its arrays, padded to the longest; waits for them at most so long."""
        import ray

        arrays = ray.get(list(self.parts), timeout=timeout_s)
        return RolloutBatch(
            prompts=self.prompts,
            responses=self.responses,
            tokens_BL=_stacked([tokens for tokens, _ in arrays]),
            prompt_lengths_B=self.prompt_lengths_B,
            response_lengths_B=self.response_lengths_B,
            logprobs_BT=_stacked([logprobs for _, logprobs in arrays]),
            truncated_B=self.truncated_B,
            policy_version=self.policy_version,
        )


def whole(batch: RolloutBatch | StoredRollouts, timeout_s: float) -> RolloutBatch:
    """The batch with its arrays, wherever they are."""
    return batch.fetch(timeout_s) if isinstance(batch, StoredRollouts) else batch


def _stacked(arrays: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    width = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in arrays])
