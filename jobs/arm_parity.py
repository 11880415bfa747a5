"""Whether an engine's log-probabilities are the learner's: the same tokens under the same weights."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from morlaif_ray.types import Float32Array, RolloutBatch


class Gap(NamedTuple):
    """Differences between engine and learner in nats."""

    worst: float
    """On a single token; NaN where either side has one."""
    mean: float
    """Over all response tokens."""

    def alarm(self, threshold: float) -> str | None:
        """What to say where a token differs by more than the threshold (`policy.parity_threshold`)."""
        if self.worst <= threshold:
            return None
        return (
            f"engine and learner differ by {self.worst:.3g} nats on a token (policy.parity_threshold is "
            f"{threshold:g}): the engine may hold other weights, or its precision is too low"
        )


def gap_between(probe: RolloutBatch, expected_BT: Float32Array) -> Gap:
    """`expected_BT`: the learner's log-probabilities of the probe's response tokens, 0 beyond their length."""
    gap_BT = np.abs(probe.logprobs_BT - expected_BT)
    return Gap(float(gap_BT.max()), float(gap_BT.sum() / probe.response_lengths_B.sum()))
