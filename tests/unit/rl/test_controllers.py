"""Adaptive KL and the running scale of rewards."""

from __future__ import annotations

import json

import numpy as np
import pytest

from morlaif_ray.rl import AdaptiveKLController, RunningScale

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def controller(adaptive: bool = True) -> AdaptiveKLController:
    return AdaptiveKLController(0.05, target=6.0, horizon=10_000.0, adaptive=adaptive)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1.0 + 0.1 * 64 / 10_000),
        (5.4, 1.0 - 0.1 * 64 / 10_000),
        (60.0, 1.0 + 0.2 * 64 / 10_000),  # clipped above
        (0.0, 1.0 - 0.2 * 64 / 10_000),  # clipped below
        (-3.0, 1.0 - 0.2 * 64 / 10_000),
    ],
)
def test_beta_follows_the_divergence_with_a_clipped_error(kl: float, factor: float) -> None:
    kl_controller = controller()
    kl_controller.update(kl, num_samples=64)
    assert kl_controller.coefficient == pytest.approx(0.05 * factor, rel=1e-12)


def test_a_fixed_coefficient_stays() -> None:
    fixed = controller(adaptive=False)
    fixed.update(100.0, 64)
    assert fixed.coefficient == 0.05


def test_the_controller_survives_json_bit_for_bit() -> None:
    first, second = controller(), controller()
    for kl in (7.1, 3.3, 6.05):
        first.update(kl, 48)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.coefficient == first.coefficient


def test_the_running_std_is_that_of_all_rewards_so_far() -> None:
    rewards = np.random.default_rng(0).normal(1e4, 3.0, 500)  # a large mean must not eat the digits
    scale = RunningScale()
    for start in range(0, 500, 64):
        scale.update(rewards[start : start + 64].tolist())
        assert scale.std == pytest.approx(np.std(rewards[: start + 64], ddof=1), rel=1e-9)
    assert scale.mean == pytest.approx(rewards.mean())


def test_the_running_std_is_one_until_two_rewards_differ() -> None:
    scale = RunningScale()
    assert scale.std == 1.0
    scale.update([2.0])
    assert scale.std == 1.0
    scale.update([2.0, 2.0])
    assert scale.std == 1.0
    scale.update([4.0])
    assert scale.std == pytest.approx(1.0)  # of 2, 2, 2, 4
    scale.update([10.0])
    assert scale.std == pytest.approx(np.std([2, 2, 2, 4, 10], ddof=1))


def test_the_running_scale_survives_json_bit_for_bit() -> None:
    first, second = RunningScale(), RunningScale()
    first.update([0.1, 0.7, -3.3])
    second.restore(json.loads(json.dumps(first.state())))
    first.update([5.5, 0.2])
    second.update([5.5, 0.2])
    assert first == second
