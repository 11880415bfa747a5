"""A learner rank reserves what it computes with, and a laptop still holds the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.bundles import Available, check_plan
from actors.placement import learner_cpus, plan_bundles
from morlaif_ray.config import load_config
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ResourceError

pytestmark = pytest.mark.unit
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.mark.parametrize(
    ("settings", "cpus"),
    [
        ({}, 0.4),
        ({"learner_threads": 2}, 0.8),
        ({"learner_threads": 3}, 1.2),
        ({"learner_threads": 8, "learner_gpus_per_rank": 1.0}, 0.4),
    ],
)
def test_each_thread_on_a_cpu_is_reserved(settings: dict[str, float], cpus: float) -> None:
    assert learner_cpus(PolicyConfig(**settings)) == cpus


def test_threads_that_two_cores_cannot_hold_are_refused_with_the_setting_that_helps() -> None:
    laptop = Available(cpus=2.0, gpus=0.0)
    check_plan(plan_bundles(load_config(DEMO, [])), laptop)
    check_plan(
        plan_bundles(load_config(DEMO, ["policy.learner_threads=2", "policy.concurrent_arms=1"])),
        laptop,
    )
    with pytest.raises(
        ResourceError,
        match=r"^5_policy needs 2\.7 CPUs \(2 x PPO learner at 0\.8 CPU, .*, there are 2; reduce "
        r"policy\.concurrent_arms or policy\.learner_threads",
    ):
        check_plan(plan_bundles(load_config(DEMO, ["policy.learner_threads=2"])), laptop)
