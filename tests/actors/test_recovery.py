"""Actors that die or hang on a real local Ray: the work ends with the same result, or with one line that says why."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors import SafetensorError

from actors import rollout_pool
from actors.preference_panel import Column, PreferencePanel, panel_columns
from actors.rollout_pool import RolloutPool
from actors.supervision import SupervisedActor, call, map_over, wait_all_ready
from actors.training import fit_sft
from jobs.arm import Arm
from jobs.context import JobContext
from jobs.progress import Reporter
from jobs.tracking import PrometheusGauges
from jobs.train_policy import run_arm
from morlaif_ray.artifacts import read_json, read_table
from morlaif_ray.config import Config, load_config
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ActorLostError, ArtifactError
from morlaif_ray.rl import PPOLearner
from morlaif_ray.rl.generation import SamplingSettings, TransformersEngine
from morlaif_ray.types import GenerationRequest
from tests.jobs.commands import SETTINGS, SMOKE, FinishedRun
from tests.processes import WAIT_S, kill, once, pid_of, wait_until_gone

pytestmark = [
    pytest.mark.actors,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(2400),
]
SAMPLING = SamplingSettings(max_new_tokens=12)


@pytest.fixture(autouse=True, scope="module")
def _own_classes_travel() -> Iterator[None]:
    """Workers cannot import test modules: send the classes of this one whole."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Fragile:
    """Answers at once, except in its first life: there `work` leaves its pid in a file and never ends."""

    def __init__(self, folder: str) -> None:
        self._pid_file = Path(folder, "pid")
        self._ready = Path(folder, "number")
        self.number = 0

    def ping(self) -> int:
        return os.getpid()

    def set_number(self, number: int) -> None:
        self.number = number

    def work(self, value: int) -> int:
        if not self._pid_file.exists():
            partial = self._pid_file.with_suffix(".partial")
            partial.write_text(str(os.getpid()))
            partial.rename(self._pid_file)
            threading.Event().wait()
        return value * value + self.number

    def fail(self) -> None:
        raise ArtifactError("no such thing; write another")

    def fill_the_disk(self) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")


class Unstartable(Fragile):
    def __init__(self, folder: str) -> None:
        raise ArtifactError(f"{folder}: damaged; train it again")


def supervised(folder: Path, cls: type[Fragile] = Fragile, **changes: Any) -> SupervisedActor:
    import ray

    settings: dict[str, Any] = {
        "max_restarts": 1,
        "start_timeout_s": WAIT_S,
        "call_timeout_s": WAIT_S,
    }
    spawn = ray.remote(cls).options(num_cpus=0).remote
    return SupervisedActor("the fragile one", lambda: spawn(str(folder)), **(settings | changes))


def killed_while_working(folder: Path) -> threading.Thread:
    """Sends SIGKILL to the actor's process as soon as its call runs."""
    pid_file = folder / "pid"
    return once(pid_file.exists, lambda: os.kill(int(pid_file.read_text()), signal.SIGKILL))


# ---------------------------------------------------------------- supervision


def test_a_call_survives_the_kill_of_its_actor_and_the_successor_is_brought_up_to_date(
    tmp_path: Path,
) -> None:
    said: list[str] = []

    def bring_up_to_date(handle: Any) -> None:
        import ray

        ray.get(handle.set_number.remote(7), timeout=WAIT_S)

    actor = supervised(tmp_path, after_start=bring_up_to_date, say=said.append)
    killer = killed_while_working(tmp_path)
    assert call(actor, "work", 3) == 9 + 7
    killer.join()
    assert actor.num_restarts == 1
    assert len(said) == 1
    assert said[0].startswith("the fragile one was lost (")
    assert said[0].endswith("starting it again (1/1)")
    actor.stop()


def test_a_hung_actor_is_replaced_after_its_call_time_out(tmp_path: Path) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        actor.call_timeout_s = WAIT_S  # only the one that hangs has little time

    actor = supervised(tmp_path, say=say)
    actor.submit("work", (2,))  # hangs, and all calls after it
    hangs = threading.Event()
    once((tmp_path / "pid").exists, hangs.set)
    assert hangs.wait(WAIT_S)
    actor.call_timeout_s = 1.0
    assert call(actor, "work", 3) == 9
    assert len(said) == 1
    assert "no answer to work in 1 s" in said[0]
    wait_until_gone(int((tmp_path / "pid").read_text()))
    actor.stop()


def test_beyond_the_restart_budget_the_error_names_actor_cause_and_setting(tmp_path: Path) -> None:
    actor = supervised(tmp_path, max_restarts=0, call_timeout_s=1.0)
    with pytest.raises(ActorLostError) as caught:
        call(actor, "work", 3)
    assert caught.value.message == (
        "the fragile one died 1 times (last: no answer to work in 1 s); its restart budget is 0 "
        "(policy.max_restarts); see logs/ in the run folder"
    )


def test_an_error_of_the_method_itself_arrives_as_it_is_and_costs_no_restart(
    tmp_path: Path,
) -> None:
    actor = supervised(tmp_path)
    with pytest.raises(ArtifactError, match=r"^no such thing; write another$"):
        call(actor, "fail")
    with pytest.raises(OSError, match="No space left on device") as caught:
        call(actor, "fill_the_disk")
    assert caught.value.errno == errno.ENOSPC
    assert actor.num_restarts == 0
    actor.stop()


def test_an_actor_whose_constructor_fails_says_why_and_leaves_none_of_its_group_behind(
    tmp_path: Path,
) -> None:
    sound = supervised(tmp_path)
    sound.wait_ready()
    pid = pid_of(sound.handle)
    broken = supervised(tmp_path, Unstartable)
    with pytest.raises(ActorLostError) as caught:
        wait_all_ready([sound, broken])
    assert caught.value.message == (
        f"the fragile one did not start: {tmp_path}: damaged; train it again"
    )
    wait_until_gone(pid)


def test_items_of_a_killed_worker_are_done_by_its_successor_in_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "pid").touch()  # this one works at once
    workers = [supervised(tmp_path / name) for name in ("a", "b")]
    killer = killed_while_working(tmp_path / "a")
    seen: list[int] = []
    results = map_over(workers, "work", [(i,) for i in range(9)], lambda i, _: seen.append(i))
    killer.join()
    assert results == [i * i for i in range(9)]
    assert sorted(seen) == list(range(9))
    assert [worker.num_restarts for worker in workers] == [1, 0]
    for worker in workers:
        worker.stop()


# ---------------------------------------------------------------- pool and panel, on the models of a finished run


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(SMOKE, list(SETTINGS))


@pytest.fixture
def pool(config: Config, finished_run: FinishedRun) -> Iterator[RolloutPool]:
    pool = RolloutPool(config, str(finished_run.run_dir / "0_sft" / "model"), 2, lambda text: None)
    yield pool
    pool.close()


def requests(count: int) -> list[GenerationRequest]:
    prompt = "\n\nHuman: what is a lamp?\n\nAssistant:"
    return [GenerationRequest(prompt, seed) for seed in range(count)]


def other_weights(finished_run: FinishedRun) -> dict[str, np.ndarray[Any, Any]]:
    """The policy of an arm: not what the workers started with."""
    engine = TransformersEngine.from_path(finished_run.run_dir / "5_policy" / "linear" / "model")
    return {name: p.detach().numpy() for name, p in engine.model.named_parameters()}


def adapters(finished_run: FinishedRun, version: int) -> list[Any]:
    """Of the model that the workers started with, far enough from it to be noticed."""
    policy = PolicyConfig(lora=LoraConfig(rank=2))
    learner = PPOLearner(str(finished_run.run_dir / "0_sft" / "model"), policy, seed=0)
    with torch.no_grad():
        for name, parameter in learner.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    sent, base = learner.policy.sent_weights(), learner.policy.base_checksum
    return rollout_pool.weights_reference(sent, version, max_bytes=20_000, base=base)


def test_a_rollout_worker_killed_after_a_refresh_rejoins_with_the_current_weights(
    pool: RolloutPool, finished_run: FinishedRun
) -> None:
    at_first = pool.generate(requests(8), SAMPLING)
    pool.load_weights(adapters(finished_run, 5), 5)  # base and adapters, merged anew after a kill
    expected = pool.generate(requests(8), SAMPLING)
    kill(pool._workers[0].handle)
    again = pool.generate(requests(8), SAMPLING)
    assert pool._workers[0].num_restarts == 1
    assert again.policy_version == expected.policy_version == 5
    assert again.responses == expected.responses
    np.testing.assert_array_equal(again.logprobs_BT, expected.logprobs_BT)
    assert not np.array_equal(at_first.logprobs_BT, expected.logprobs_BT)
    pool.load_weights(rollout_pool.weights_reference(other_weights(finished_run), 6), 6)
    other = pool.generate(requests(8), SAMPLING)
    assert other.policy_version == 6
    assert not np.array_equal(other.logprobs_BT, expected.logprobs_BT)


def test_a_panel_actor_killed_in_mid_batch_loses_and_doubles_no_score(
    config: Config, finished_run: FinishedRun
) -> None:
    folder = finished_run.run_dir / "3_preference_models"
    columns = panel_columns(folder, ["random_principle"])
    panel = PreferencePanel(config, columns, lambda text: None)
    texts = [f"\n\nHuman: what is {i}?\n\nAssistant: a thing of {i}." for i in range(50)]
    expected = panel.score(texts)
    assert expected.scores_BK.shape == (50, 13)
    victim = psutil.Process(pid_of(panel._actors[0].handle))
    victim.suspend()  # the call is under way and cannot end before the kill
    answer: list[Any] = []
    scoring = threading.Thread(target=lambda: answer.append(panel.score(texts)), daemon=True)
    scoring.start()
    victim.kill()
    scoring.join(timeout=WAIT_S)
    np.testing.assert_array_equal(answer[0].scores_BK, expected.scores_BK)
    assert answer[0].principles == expected.principles
    panel.close()


def test_a_panel_on_a_missing_model_ends_with_the_path(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ActorLostError, match=r"^preference model nowhere did not start: .*nowhere"):
        PreferencePanel(config, [Column("x", str(tmp_path / "nowhere"), 0)], lambda text: None)


def test_a_baseline_that_was_not_trained_is_named(finished_run: FinishedRun) -> None:
    with pytest.raises(
        ArtifactError, match=r"no baseline 'general_principle'; add it to preference"
    ):
        panel_columns(finished_run.run_dir / "3_preference_models", ["general_principle"])


# ---------------------------------------------------------------- a whole arm


class Counter:
    """A progress bar that is only counted."""

    done = 0

    def advance(self, amount: int = 1) -> None:
        self.done += amount

    def note(self, text: str) -> None: ...


def kill_before(monkeypatch: pytest.MonkeyPatch, method: str, step: int, victim: Any) -> None:
    """Kills an actor of the arm just before the arm's `method` of that step, once."""
    original = getattr(Arm, method)
    calls: list[int] = []

    def killing(self: Arm, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            kill(victim(self))
        return original(self, *arguments)

    monkeypatch.setattr(Arm, method, killing)


def test_an_arm_that_loses_every_kind_of_actor_ends_with_the_same_bits(
    config: Config, run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_before(monkeypatch, "generate", 2, lambda arm: arm._rollouts._workers[0].handle)
    kill_before(monkeypatch, "score", 4, lambda arm: arm.panel._actors[0].handle)
    kill_before(monkeypatch, "refresh", 6, lambda arm: arm._learner)  # weights not yet handed out
    kill_before(monkeypatch, "finish", 1, lambda arm: arm._learner)
    policy = config.policy.model_copy(update={"max_restarts": 2})
    context = JobContext(
        config.model_copy(update={"policy": policy}), run_copy, Reporter(quiet=True)
    )
    published = run_copy / "5_policy" / "linear"
    work = run_copy / "work" / "5_policy" / "linear"
    columns = panel_columns(run_copy / "3_preference_models", ["random_principle"])
    panel = PreferencePanel(context.config, columns, lambda text: None)
    arm = Arm(context, config.policy.arms[0], work, panel)
    bar = Counter()
    run_arm(arm, bar, PrometheusGauges(), threading.Event())
    assert arm._restarts == 2
    assert [w.num_restarts for w in (*arm._rollouts._workers, *panel._actors)] == [1, 1]
    assert bar.done == config.policy.num_steps
    for name in ("model/model.safetensors", "metrics.parquet", "summary.json"):
        assert (work / name).read_bytes() == (published / name).read_bytes(), name
    panel.close()


def test_a_learner_beyond_its_budget_names_arm_and_setting_and_keeps_its_checkpoint(
    config: Config, run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_before(monkeypatch, "update", 3, lambda arm: arm._learner)
    policy = config.policy.model_copy(update={"max_restarts": 0})
    context = JobContext(
        config.model_copy(update={"policy": policy}), run_copy, Reporter(quiet=True)
    )
    work = run_copy / "work" / "5_policy" / "linear"
    columns = panel_columns(run_copy / "3_preference_models", ["random_principle"])
    panel = PreferencePanel(context.config, columns, lambda text: None)
    arm = Arm(context, config.policy.arms[0], work, panel)
    with pytest.raises(
        ActorLostError, match=r"^arm 'linear': the learner died 1 times .*policy\.max_restarts is 0"
    ):
        run_arm(arm, Counter(), PrometheusGauges(), threading.Event())
    assert (work / "checkpoint" / "state.json").is_file()
    panel.close()
    arm._rollouts.close()


# ---------------------------------------------------------------- Ray Train


def test_sft_on_two_ray_train_workers_leaves_one_model_and_the_same_again(
    config: Config, finished_run: FinishedRun, tmp_path: Path
) -> None:
    first = finished_run.run_dir / "0_sft"
    shutil.copy2(first / "dialogues.parquet", tmp_path)
    sft = config.sft.model_copy(update={"num_workers": 2, "num_steps": 4, "checkpoint_every": 2})
    two = config.model_copy(update={"sft": sft})
    advanced: list[int] = []
    fit_sft(two, tmp_path, str(first / "model"), advanced.append)
    assert sum(advanced) == 4
    assert read_json(tmp_path / "metrics.json")["num_dialogues"] == len(
        read_table(tmp_path / "dialogues.parquet")["prompt"]
    )
    engine = TransformersEngine.from_path(tmp_path / "model")
    assert len(engine.generate(requests(2), SAMPLING).responses) == 2
    # A driver that died after the last checkpoint: the second call takes no further step.
    results = ("model/model.safetensors", "training.csv", "metrics.json")
    before = [(tmp_path / name).read_bytes() for name in results]
    shutil.rmtree(tmp_path / "model")
    fit_sft(two, tmp_path, str(first / "model"), advanced.append)
    assert [(tmp_path / name).read_bytes() for name in results] == before
