"""A cluster that is not there or too small ends the command in one line, before any stage."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.checks import check_before_start
from jobs.context import JobContext
from jobs.progress import Reporter
from morlaif_ray.config import load_config
from tests.jobs.commands import ROOT, Ended, setting, small

pytestmark = pytest.mark.jobs


def test_an_address_without_ray_fails_in_seconds_and_says_so(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: refuses connections
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        ended = morlaif(*small(tmp_path / "run", *setting(f"cluster.address={address}")))
    assert ended == Ended(
        5,
        f"no Ray at {address} (Connection refused); start one with 'ray start --head', or unset "
        f"cluster.address and RAY_ADDRESS to use a local Ray",
    )


def test_an_address_where_something_else_listens_is_said_to_be_no_ray(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        words = setting(f"cluster.address={address}", "cluster.connect_timeout_s=1")
        ended = morlaif(*small(tmp_path / "run", *words))
    assert ended.code == 5
    assert ended.error.startswith(f"what listens at {address} is not Ray; give the address that")


def test_an_address_of_the_wrong_form_shows_the_right_one(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = morlaif(*small(tmp_path / "run", *setting("cluster.address=my-cluster")))
    assert ended == Ended(5, "Ray address 'my-cluster': write it as host:port, e.g. 10.0.0.5:6379")


def test_a_plan_that_needs_more_cpus_fails_before_any_stage(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = morlaif(*small(tmp_path / "run", *setting("cluster.num_cpus=1")))
    assert ended == Ended(
        5,
        "5_policy needs 1.9 CPUs (2 x PPO learner at 0.4 CPU, 2 x rollout worker at 0.4 CPU, "
        "1 x preference model at 0.3 CPU), there are 1; reduce policy.concurrent_arms or policy.num_rollout_workers "
        "or the panel (preference.panel_placement: one_actor), or add CPUs (a local Ray: cluster.num_cpus)",
    )
    assert not (tmp_path / "run" / "0_sft").exists()


@pytest.mark.parametrize("name", ["demo", "smoke"])
def test_the_laptop_configs_pass_all_checks_on_two_cpus(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    check_before_start(JobContext(config, tmp_path, Reporter(quiet=True)))
