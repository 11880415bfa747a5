"""A PPO run that loses processes at random moments ends with the undisturbed run's bytes (`benchmarks.ppo_kills`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.ppo_kills import (
    LONGEST_DELAY_S,
    VICTIMS,
    Kill,
    disturbed_run,
    plan_kills,
    stage_hashes,
    without_results,
)
from tests.jobs.commands import NUM_STEPS, SETTINGS, SMOKE, FinishedRun

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(2400)]
ARGUMENTS = ["--config", str(SMOKE), *(word for s in SETTINGS for word in ("--set", s))]


def test_the_kills_are_a_function_of_the_seed_and_reach_every_kind_of_process() -> None:
    assert plan_kills(3, 5, 40) == plan_kills(3, 5, 40)
    assert plan_kills(3, 5, 40) != plan_kills(4, 5, 40)
    kills = [kill for seed in range(20) for kill in plan_kills(seed, 3, 40)]
    assert {kill.victim for kill in kills} == set(VICTIMS)
    assert all(0 <= kill.step < 39 and 0.0 <= kill.delay_s <= LONGEST_DELAY_S for kill in kills)


def test_a_run_that_loses_one_process_of_every_kind_ends_with_the_same_bytes(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    run_dir = without_results(finished_run.run_dir, tmp_path / "run")
    assert not (run_dir / "5_policy").exists()
    kills = [
        Kill(1, 0.1, "driver"),
        # The rest in one life of the driver, which then has to tell of each.
        Kill(3, 0.0, "learner"),
        Kill(5, 0.05, "rollout worker"),
        Kill(NUM_STEPS // 2, 0.0, "preference model"),
    ]
    outcome = disturbed_run(run_dir, ARGUMENTS, kills, stage_hashes(finished_run.run_dir))
    log = run_dir.with_suffix(".log").read_text()
    assert outcome.exit_code == 0, log
    assert outcome.missed == [], log
    assert len(outcome.done) == len(kills)
    assert outcome.differing == []
    for lost in ("learner lost", "rollout worker 0 was lost", "preference model trunk"):
        assert lost in log, log


def test_a_changed_byte_is_seen(finished_run: FinishedRun, tmp_path: Path) -> None:
    reference = stage_hashes(finished_run.run_dir)
    assert {"linear/model/model.safetensors", "linear/metrics.parquet"} <= reference.keys()
    folder = tmp_path / "run" / "5_policy"
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(b"1")
    before = stage_hashes(tmp_path / "run")
    (folder / "x").write_bytes(b"2")
    assert stage_hashes(tmp_path / "run") != before
