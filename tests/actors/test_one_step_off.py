"""Whole arms in the modes of the loop, on the stages of a finished run: the same bits whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.preference_panel import PreferencePanel, panel_columns
from actors.rollout_pool import RolloutPool
from jobs.arm import Arm, ArmStopped
from jobs.context import JobContext
from jobs.progress import Reporter
from jobs.tracking import PrometheusGauges
from jobs.train_policy import run_arm
from morlaif_ray.artifacts import read_table
from morlaif_ray.config import Config, load_config
from morlaif_ray.rl.generation import SamplingSettings
from morlaif_ray.types import GenerationRequest
from tests.jobs.commands import NUM_STEPS, SETTINGS, SMOKE, FinishedRun
from tests.processes import WAIT_S, kill, pid_of, wait_until_gone

pytestmark = [
    pytest.mark.actors,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(2400),
]
RESULTS = ("model/model.safetensors", "metrics.parquet", "summary.json")


class Counter:
    """A progress bar that is only counted."""

    done = 0

    def advance(self, amount: int = 1) -> None:
        self.done += amount

    def note(self, text: str) -> None: ...


class Said(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(SMOKE, list(SETTINGS))


@pytest.fixture(scope="module")
def stages(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages that PPO reads."""
    folder = tmp_path_factory.mktemp("stages")
    for name in ("0_sft", "3_preference_models", "4_reward"):
        shutil.copytree(finished_run.run_dir / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def panel(config: Config, stages: Path) -> Iterator[PreferencePanel]:
    columns = panel_columns(stages / "3_preference_models", ["random_principle"])
    panel = PreferencePanel(config, columns, lambda text: None)
    yield panel
    panel.close()


def make_arm(
    config: Config, stages: Path, work: Path, panel: PreferencePanel, **policy: Any
) -> Arm:
    changed = config.policy.model_copy(update={"max_restarts": 3, **policy})
    context = JobContext(config.model_copy(update={"policy": changed}), stages, Said())
    return Arm(context, config.policy.arms[0], work, panel)


def run(arm: Arm, stop: threading.Event | None = None) -> None:
    run_arm(arm, Counter(), PrometheusGauges(), stop or threading.Event())  # type: ignore[arg-type]


def timings(stages: Path) -> list[dict[str, float]]:
    rows = (stages / "timings" / "policy-linear.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows[-NUM_STEPS:]]


def assert_same_bits(left: Path, right: Path) -> None:
    for name in RESULTS:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


@pytest.fixture(scope="module")
def undisturbed(
    config: Config, stages: Path, panel: PreferencePanel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One step off, from beginning to end."""
    work = tmp_path_factory.mktemp("undisturbed")
    run(make_arm(config, stages, work, panel, staleness=1))
    (work / "timings.json").write_text(json.dumps(timings(stages)))
    return work


def test_one_step_off_samples_beside_the_update_and_says_how_it_went(
    undisturbed: Path, finished_run: FinishedRun
) -> None:
    rows = json.loads((undisturbed / "timings.json").read_text())
    assert [row["staleness"] for row in rows] == [0.0] + [1.0] * (NUM_STEPS - 1)
    for row in rows:
        assert 0.0 <= row["learner_idle_share"] <= 1.0
        assert row["seconds_update"] <= row["seconds_step"]
    assert rows[0]["parity_gap_max"] < 1e-3
    synchronous = finished_run.run_dir / "5_policy" / "linear"
    ours = read_table(undisturbed / "metrics.parquet")
    theirs = read_table(synchronous / "metrics.parquet")
    # The first two batches are of the first weights in both modes or only here: the curves part at step 2.
    assert ours["reward_mean"][0] == theirs["reward_mean"][0]
    assert ours["reward_mean"][2:] != theirs["reward_mean"][2:]


def test_one_step_off_losing_actors_ends_with_the_same_bits(
    config: Config,
    stages: Path,
    panel: PreferencePanel,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victims = {
        ("update", 3): lambda arm: arm._learner,
        ("generate", 5): lambda arm: arm._rollouts._workers[0].handle,
        ("checkpoint", 3): lambda arm: arm._learner,
        ("refresh", 9): lambda arm: arm._learner,
    }
    calls: dict[str, int] = {}
    for method in ("update", "generate", "checkpoint", "refresh"):
        original = getattr(Arm, method)

        def killing(self: Arm, *args: Any, _name: str = method, _go: Any = original) -> Any:
            calls[_name] = calls.get(_name, 0) + 1
            victim = victims.get((_name, calls[_name]))
            if victim is not None:
                kill(victim(self))
            return _go(self, *args)

        monkeypatch.setattr(Arm, method, killing)
    arm = make_arm(config, stages, tmp_path, panel, staleness=1)
    run(arm)
    assert arm._restarts == 3
    assert arm._rollouts._workers[0].num_restarts == 1
    assert_same_bits(tmp_path, undisturbed)


def test_one_step_off_stopped_and_resumed_ends_with_the_same_bits(
    config: Config,
    stages: Path,
    panel: PreferencePanel,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    stop = threading.Event()
    original = Arm.record

    def record(self: Arm, step: int, metrics: dict[str, float]) -> None:
        original(self, step, metrics)
        if step == 5:
            stop.set()

    monkeypatch.setattr(Arm, "record", record)
    first = make_arm(config, stages, tmp_path, panel, staleness=1, checkpoint_every=100)
    with pytest.raises(ArmStopped):
        run(first, stop)
    ray.kill(first._learner)
    first._rollouts.close()
    assert [path.name for path in (tmp_path / "in_flight").iterdir()] == ["5.npz"]
    second = make_arm(config, stages, tmp_path, panel, staleness=1)
    run(second)
    assert_same_bits(tmp_path, undisturbed)


def test_streaming_to_the_panel_changes_nothing_from_run_to_run(
    config: Config, stages: Path, panel: PreferencePanel, tmp_path: Path
) -> None:
    settings = {"rollout_chunk": 3, "num_rollout_workers": 2, "samples_per_prompt": 2}
    for name, staleness in (("a", 0), ("b", 0)):
        arm = make_arm(config, stages, tmp_path / name, panel, staleness=staleness, **settings)
        arm.num_steps = 4
        arm._record._num_steps = 4
        run(arm)
        prompts = arm._schedule.prompts_of(1)
        assert prompts[0::2] == prompts[1::2]
        assert len(set(prompts)) == len(prompts) // 2
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_other_weights_in_an_engine_raise_the_alarm(
    config: Config, stages: Path, panel: PreferencePanel, tmp_path: Path
) -> None:
    import ray

    arm = make_arm(config, stages, tmp_path, panel, num_rollout_workers=2)
    arm.start()
    arm.check_parity(0)
    assert arm.gauges["parity_gap_max"] < 1e-3
    said = arm.context.reporter
    assert isinstance(said, Said)
    assert said.lines == []
    worker = arm._rollouts._workers[1].handle
    weights = ray.get(arm._learner.weights.remote(), timeout=WAIT_S)
    ray.get(worker.load_weights.remote({n: 1.5 * w for n, w in weights.items()}, 0), timeout=WAIT_S)
    arm.check_parity(0)
    assert arm.gauges["parity_alarms"] == 1.0
    assert arm.gauges["parity_gap_max"] > arm.gauges["parity_gap_mean"] > 0.05
    (line,) = said.lines
    assert "step 0: engine and learner differ by" in line
    assert "policy.parity_threshold is 0.5" in line
    ray.kill(arm._learner)
    arm._rollouts.close()


def test_a_stopped_rollout_worker_is_replaced_within_its_time_out(
    config: Config, stages: Path
) -> None:
    """SIGSTOP: the process is there and answers nothing, while the other worker goes on."""
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        stopped.call_timeout_s = WAIT_S  # its successor is in no hurry

    pool = RolloutPool(config, str(stages / "0_sft" / "model"), 2, say)
    prompt = "\n\nHuman: what is a lamp?\n\nAssistant:"
    asked = [GenerationRequest(prompt, seed) for seed in range(8)]
    chunks = [asked[i : i + 2] for i in range(0, 8, 2)]
    settings = SamplingSettings(max_new_tokens=12)
    expected = pool.map(chunks, settings)
    stopped, other = pool._workers
    stopped.call_timeout_s, other.call_timeout_s = 1.0, WAIT_S
    victim = pid_of(stopped.handle)
    os.kill(victim, signal.SIGSTOP)
    again = pool.map(chunks, settings)
    assert said == [
        "rollout worker 0 was lost (no answer to generate in 1 s); starting it again (1/"
        f"{config.policy.max_restarts})"
    ]
    for left, right in zip(again, expected, strict=True):
        assert left.responses == right.responses
        np.testing.assert_array_equal(left.logprobs_BT, right.logprobs_BT)
    wait_until_gone(victim)
    pool.close()
