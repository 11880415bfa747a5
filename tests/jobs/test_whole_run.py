"""`morlaif run` as a person runs it: whole, twice, stopped in every rough way, and gone on with."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from morlaif_ray.artifacts import STAGES, read_manifest
from tests.jobs.commands import (
    NUM_STEPS,
    FinishedRun,
    Running,
    differing,
    file_hashes,
    left_over,
    small,
    without_stages,
)

# Several whole runs in one test: the limit is for a busy machine.
pytestmark = [pytest.mark.jobs, pytest.mark.timeout(2400)]
PLAIN_LINE = re.compile(r"^ *\d+\.\ds .*\S$")


def test_every_stage_is_published_with_a_manifest_that_lists_its_files(
    finished_run: FinishedRun,
) -> None:
    for stage in STAGES:
        manifest = read_manifest(finished_run.run_dir / stage)
        assert manifest is not None, stage
        found = {
            str(path.relative_to(finished_run.run_dir / stage))
            for path in (finished_run.run_dir / stage).rglob("*")
            if path.is_file() and path.name != "manifest.json"
        }
        assert found == set(manifest.files), stage


def test_the_run_ends_with_the_path_of_its_report_on_standard_output(
    finished_run: FinishedRun,
) -> None:
    report = finished_run.run_dir / "report.html"
    assert finished_run.stdout == f"{report}\n"
    assert (
        report.read_bytes() == (finished_run.run_dir / "6_evaluation" / "report.html").read_bytes()
    )


def test_nothing_is_left_of_a_finished_run_but_its_results(finished_run: FinishedRun) -> None:
    assert finished_run.left_over == []
    assert {path.name for path in finished_run.run_dir.iterdir()} == {
        *STAGES,
        "config.yaml",
        "ledger",
        "logs",
        "report.html",
        "tensorboard",
        "timings",
        "timings.json",
    }


def test_the_first_line_comes_at_once_and_all_lines_are_plain(finished_run: FinishedRun) -> None:
    # Within 5 s of the minute that it takes here; a slow machine is slow at both.
    assert finished_run.lines[0][0] < finished_run.lines[-1][0] / 12
    assert [line for _, line in finished_run.lines if not PLAIN_LINE.match(line)] == []


def test_seconds_are_recorded_beside_the_stages_and_not_in_them(finished_run: FinishedRun) -> None:
    timings = json.loads((finished_run.run_dir / "timings.json").read_text())
    assert set(timings) == {*STAGES, "total"}
    rows = (finished_run.run_dir / "timings" / "policy-linear.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, NUM_STEPS + 1))


def test_a_second_run_skips_every_stage_in_seconds_and_changes_no_byte(
    run_copy: Path, finished_run: FinishedRun
) -> None:
    before = file_hashes(run_copy)
    timings = (run_copy / "timings.json").read_bytes()
    running = Running(small(run_copy))
    assert running.end() == 0
    assert re.findall(r"(\w+): up to date, skipped", running.text) == list(STAGES)
    assert "starting a local Ray" not in running.text
    assert running.lines[-1][0] < finished_run.lines[-1][0] / 6
    assert file_hashes(run_copy) == before
    assert (run_copy / "timings.json").read_bytes() == timings


def test_quiet_says_nothing_where_nothing_is_wrong(run_copy: Path) -> None:
    running = Running(small(run_copy, "--quiet"))
    assert running.end() == 0
    assert running.text == ""
    assert running.stdout == ""


def test_a_run_stopped_in_every_rough_way_ends_with_the_same_bytes(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    """From nothing: a power cut in SFT, then in PPO Ctrl-C, SIGTERM and SIGKILL, each at another step."""
    run_dir = tmp_path / "run"
    sft, policy = (run_dir / "work" / stage for stage in ("0_sft", "5_policy"))

    running = Running(small(run_dir))
    running.wait_until(lambda: any(sft.glob("ray_train/sft/checkpoint_*")), "a checkpoint of SFT")
    cut_the_power(running)

    # One process for SFT and PPO: what Ray Train does to signals must not outlive the SFT.
    running = Running(small(run_dir))
    running.wait_until(lambda: steps_of(policy, "linear") >= 2, "PPO")
    interrupt(running, signal.SIGINT, whole_group=True)
    stopped_at = steps_of(policy, "linear")
    assert 2 <= stopped_at < NUM_STEPS
    assert checkpoint_of(policy, "linear") == stopped_at  # it wrote one before it ended

    running = Running(small(run_dir))
    running.wait_until(lambda: steps_of(policy, "linear") > stopped_at, "a further step")
    interrupt(running, signal.SIGTERM)
    assert "4_sweep: up to date, skipped" in running.text
    assert "0_sft: up to date, skipped" in running.text
    stopped_at, before = steps_of(policy, "linear"), stopped_at
    assert before < stopped_at < NUM_STEPS
    assert checkpoint_of(policy, "linear") == stopped_at

    running = Running(small(run_dir))
    running.wait_until(lambda: checkpoint_of(policy, "linear") > stopped_at, "a later checkpoint")
    agents = kill_driver(running)
    assert not (run_dir / "5_policy").exists()

    running = Running(small(run_dir))
    assert running.end() == 0, running.text
    assert differing(run_dir, finished_run.run_dir) == []
    assert left_over(agents, timeout_s=300.0) == []


def test_control_c_during_tune_trials_ends_the_job_and_not_only_the_experiment(
    run_copy: Path,
) -> None:
    without_stages(run_copy, *STAGES[3:])
    work = run_copy / "work" / "3_preference_models"
    running = Running(small(run_copy, verb="train_preference_models"))
    running.wait_until(lambda: any(work.glob("ray_tune/*/*")), "trials")
    interrupt(running, signal.SIGINT, whole_group=True)
    assert (work / "train.parquet").is_file()
    assert not (run_copy / "3_preference_models").exists()


def test_accepting_a_config_change_redoes_just_the_stages_concerned(run_copy: Path) -> None:
    before = file_hashes(run_copy)
    setting = ("--set", "evaluation.num_samples_shown=2")
    refused = Running(small(run_copy, *setting))
    assert refused.end() == 3
    assert file_hashes(run_copy) == before
    running = Running(small(run_copy, *setting, "--accept-config-change"))
    assert running.end() == 0, running.text
    skipped = re.findall(r"(\w+): up to date, skipped", running.text)
    assert skipped == [stage for stage in STAGES if stage != "6_evaluation"]
    after = file_hashes(run_copy)
    changed = {name.split("/")[0] for name in before if after.get(name) != before[name]}
    assert changed == {"6_evaluation", "config.yaml", "report.html"}
    assert len(json.loads((run_copy / "6_evaluation" / "samples.json").read_text())) == 2
    old = run_copy / "superseded" / "6_evaluation.1"
    assert (old / "manifest.json").is_file()  # nothing is deleted


def test_leftovers_of_a_killed_publication_are_no_part_of_the_stage(run_copy: Path) -> None:
    for stage in ("2_feedback", "4_reward"):
        junk = run_copy / f".{stage}.partial"
        junk.mkdir()
        (junk / "half.parquet").write_bytes(b"PAR1")
    before = file_hashes(run_copy)
    shutil.rmtree(run_copy / "4_reward")
    running = Running(small(run_copy, verb="fit_weights"))
    assert running.end() == 0, running.text
    assert file_hashes(run_copy) == before
    assert not (run_copy / ".4_reward.partial").exists()


# ---------------------------------------------------------------- helpers


def cut_the_power(running: Running) -> None:
    """Everything dies at once."""
    for process in running.descendants():
        process.kill()
    running.interrupt(signal.SIGKILL)
    assert running.end() == -signal.SIGKILL


def kill_driver(running: Running) -> list[psutil.Process]:
    """SIGKILL: no handler runs. Ray's own processes must notice and end.

    Returns Ray's two agents: they spend a minute on telling the dead cluster that it is dead.
    """
    family = running.descendants()
    agents = [process for process in family if process.name().endswith("Agent")]
    running.interrupt(signal.SIGKILL)
    assert running.end() == -signal.SIGKILL
    assert left_over([process for process in family if process not in agents]) == []
    return agents


def interrupt(running: Running, number: signal.Signals, *, whole_group: bool = False) -> None:
    family = running.descendants()
    running.interrupt(number, whole_group=whole_group)
    assert running.end(timeout_s=240.0) == 130, running.text
    assert running.text.endswith("stopped; the same command goes on from here")
    assert "Traceback" not in running.text
    assert left_over(family) == []


def steps_of(work: Path, arm: str) -> int:
    log = work / arm / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def checkpoint_of(work: Path, arm: str) -> int:
    """Steps that the arm's checkpoint holds; 0 where there is none."""
    try:
        state = json.loads((work / arm / "checkpoint" / "state.json").read_text())
    except FileNotFoundError:
        return 0
    return int(state["extra"]["step"])
