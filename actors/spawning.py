"""The one way an actor gets its process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def spawn(
    plain_class: type[Any],
    *arguments: Any,
    num_cpus: float,
    num_gpus: float,
    max_concurrency: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """An actor handle of `plain_class(*arguments)` that reserves exactly these CPUs and GPUs.

    max_concurrency: calls that run at the same time, each in a thread. environment: variables, none of them secret,
    that are set before the process starts.

    Supervision restarts it, not Ray. It never joins the placement group of whoever starts it: a Tune trial's group has
    room for the trial alone.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    remote = ray.remote(plain_class).options(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_restarts=0,
        max_concurrency=max_concurrency,
        runtime_env={"env_vars": dict(environment)} if environment else None,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
    )
    return remote.remote(*arguments)
