"""The two pieces of PPO state outside the networks. Both are plain numbers and part of every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
