"""What PPO steers besides the networks: KL coefficient and reward scale (both in every checkpoint), learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass
class AdaptiveKLController:
    """Proportional controller of beta (Ziegler et al. 2019, section 2.2)."""

    coefficient: float
    target: float
    """Nats per response."""
    horizon: float
    """Samples."""
    adaptive: bool = True

    def update(self, kl: float, num_samples: int) -> None:
        """beta *= 1 + clip(kl/target - 1, -0.2, 0.2) * n / horizon."""
        if not self.adaptive:
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * num_samples / self.horizon

    def state(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def restore(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


@dataclass
class RunningScale:
    """Standard deviation of everything seen so far (Welford 1962, in Chan's batch form). Shifts nothing."""

    count: int = 0
    mean: float = 0.0
    sum_squares: float = 0.0

    def update(self, values: Sequence[float]) -> None:
        for value in values:
            self.count += 1
            delta = value - self.mean
            self.mean += delta / self.count
            self.sum_squares += delta * (value - self.mean)

    @property
    def std(self) -> float:
        """Sample standard deviation; 1 until two different values were seen."""
        if self.count < 2 or self.sum_squares <= 0.0:
            return 1.0
        return math.sqrt(self.sum_squares / (self.count - 1))

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "sum_squares": self.sum_squares}

    def restore(self, state: dict[str, float]) -> None:
        self.count = int(state["count"])
        self.mean = state["mean"]
        self.sum_squares = state["sum_squares"]


def learning_rate_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    num_steps: int,
    schedule: Literal["constant", "linear", "cosine"],
) -> float:
    """Rate of PPO step `step` (from 0): rises linearly to `peak` in `warmup_steps`, then stays or falls towards 0.

    The falling ones would reach 0 at step `num_steps`, which is not taken; beyond it the rate is 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1.0 - done)
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))
