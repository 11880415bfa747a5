"""The learner's weights straight into several workers: one group, one message, a dead member, and the way around it.

The actors' own classes and real gloo groups, in threads of this process instead of Ray's processes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors import ppo_learner
from actors.ppo_learner import LearnerSettings, PPOLearnerActor
from actors.rollout_pool import RolloutPool
from actors.rollout_worker import RolloutWorker
from actors.supervision import InputLostError, SupervisedActor, call
from actors.weight_exchange import WeightExchange, fetch_buckets
from jobs.arm import Arm
from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer, save_pretrained
from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ConfigError
from tests.ports import free_port

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.unit
WAIT_S = 60.0
POLICY = PolicyConfig(weight_transfer="gloo", weight_transfer_timeout_s=3.0, call_timeout_s=WAIT_S)


class Handle:
    """An actor handle whose actor lives in this process, a thread per call."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.dead = False
        self.calls: list[str] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(
            remote=lambda *arguments: self._ask(method, arguments),
            options=lambda num_returns: SimpleNamespace(
                remote=lambda *arguments: list(getattr(self.actor, method)(*arguments))
            ),
        )

    def _ask(self, method: str, arguments: Any) -> Future[Any]:
        self.calls.append(method)
        future: Future[Any] = Future()

        def work() -> None:
            try:
                if self.dead:
                    raise ray.exceptions.ActorDiedError()
                future.set_result(getattr(self.actor, method)(*arguments))
            except ray.exceptions.RayError as error:
                future.set_exception(error)
            except Exception as error:  # noqa: BLE001 - as Ray does
                future.set_exception(ray.exceptions.RayTaskError(method, "Traceback", error))

        threading.Thread(target=work, daemon=True).start()
        return future


@pytest.fixture(autouse=True)
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Ray's calls as many as are needed here, for the handles above."""

    def get(reference: Any, timeout: float) -> Any:
        try:
            return reference.result(timeout)
        except FutureTimeoutError:
            raise ray.exceptions.GetTimeoutError from None

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda all_, num_returns, timeout: wait(all_, timeout))
    monkeypatch.setattr(ray, "kill", lambda handle: setattr(handle, "dead", True))
    monkeypatch.setattr(ppo_learner, "free_address", lambda: f"127.0.0.1:{free_port()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_word_tokenizer(["red sun moon"], vocabulary_size=20, max_length=16)
    size = ScratchModel(width=16, num_layers=1, num_heads=2, max_length=16)
    save_pretrained(build_scratch_model(size, tokenizer, seed=1), tokenizer, folder)
    return str(folder)


class System:
    """A learner and the workers of a pool."""

    def __init__(self, folder: str, checkpoints: Path, policy: PolicyConfig = POLICY) -> None:
        actor = PPOLearnerActor(LearnerSettings(folder, policy, 0, "float32", checkpoints))
        actor.begin()
        self.learner = Handle(actor)
        pool: Any = RolloutPool.__new__(RolloutPool)
        pool._policy, pool._weights, pool._version = policy, None, 0
        pool._workers = [
            SupervisedActor(
                f"rollout worker {index}",
                lambda: Handle(RolloutWorker(folder)),
                max_restarts=2,
                start_timeout_s=WAIT_S,
                call_timeout_s=WAIT_S,
                after_start=pool._refresh,
            )
            for index in range(2)
        ]
        pool._exchange = WeightExchange(pool._workers, policy)
        self.pool: RolloutPool = pool

    @property
    def handles(self) -> list[Handle]:
        return [worker.handle for worker in self.pool._workers]

    def train(self, step: int) -> None:
        """Other weights, as if after an update."""
        made = self.learner.actor._learner
        made.step = step
        torch.manual_seed(step)
        for parameter in made.policy.parameters():
            torch.nn.init.normal_(parameter)

    def send(self, step: int) -> str | None:
        return self.pool.send_weights(self.learner, step, lambda _, answer: answer.result(WAIT_S))

    def load(self, step: int) -> None:
        """The other way."""
        buckets = fetch_buckets(self.learner, 1 << 20, step, WAIT_S)
        self.pool.load_weights(list(buckets), step)

    def assert_all_hold(self, step: int) -> None:
        expected = dict(self.learner.actor._learner.policy.model.named_parameters())
        for handle in self.handles:
            engine = handle.actor.engine
            assert engine.policy_version == step
            for name, parameter in engine.model.named_parameters():
                assert torch.equal(parameter, expected[name]), name

    def times_joined(self) -> list[int]:
        return [handle.calls.count("join_transfer") for handle in self.handles]


@pytest.fixture
def system(folder: str, tmp_path: Path) -> Iterator[System]:
    system = System(folder, tmp_path / "checkpoint")
    system.train(1)
    assert system.send(1) is None
    system.assert_all_hold(1)
    yield system
    system.learner.actor._outlet.close()


def test_a_group_is_formed_once_and_each_refresh_is_one_message_per_worker(system: System) -> None:
    system.train(2)
    assert system.send(2) is None
    system.assert_all_hold(2)
    for handle in system.handles:
        first, second = ["ping", "join_transfer", "receive_weights"], ["ping", "receive_weights"]
        assert handle.calls == [*first, *second]


def test_a_dead_worker_is_noticed_before_the_learner_sends_and_the_group_is_formed_anew(
    system: System,
) -> None:
    system.train(2)
    system.handles[0].dead = True
    sent = system.learner.calls.count("send_weights")
    assert str(system.send(2)).startswith("rollout worker 0: ")
    assert system.learner.calls.count("send_weights") == sent
    system.load(2)
    system.assert_all_hold(2)
    assert system.pool._workers[0].num_restarts == 1
    system.train(3)
    assert system.send(3) is None
    system.assert_all_hold(3)
    assert system.times_joined() == [1, 2]


def test_a_worker_that_is_lost_within_a_transfer_costs_that_transfer_alone(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = system.handles[1]

    def die(message: Any) -> None:
        lost.actor.engine._incoming[0].close()
        lost.dead = True
        raise ray.exceptions.ActorDiedError()

    monkeypatch.setattr(lost.actor, "receive_weights", die)
    system.train(2)
    failure = system.send(2)
    assert failure is not None
    assert "\n" not in failure
    system.load(2)
    system.assert_all_hold(2)
    system.train(3)
    assert system.send(3) is None
    system.assert_all_hold(3)
    assert system.times_joined() == [2, 1]


def test_weights_damaged_on_the_way_are_sent_again_the_other_way(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = system.handles[0].actor.engine
    group, _ = engine._incoming
    whole = group.broadcast

    def damage(bucket: Any) -> None:
        whole(bucket)
        bucket[16] ^= 1

    monkeypatch.setattr(group, "broadcast", damage)
    system.train(2)
    failure = system.send(2)
    assert failure is not None
    assert "rollout worker 0: weight refresh: 'transformer.wte.weight' of version 2" in failure
    assert engine.policy_version == 1
    system.load(2)
    system.assert_all_hold(2)


def test_a_worker_that_is_started_again_asks_the_learner_once_more(system: System) -> None:
    system.handles[0].dead = True
    call(system.pool._workers[0], "ping")
    system.assert_all_hold(1)
    system.learner.actor._learner.step = 2  # these weights exist no more
    system.handles[0].dead = True
    with pytest.raises(InputLostError, match=r"weights of version 1 exist no more: the learner"):
        call(system.pool._workers[0], "ping")
    system.learner.dead = True
    with pytest.raises(InputLostError, match=r"weights of version 2 cannot be had again \("):
        fetch_buckets(system.learner, 1 << 20, 2, WAIT_S)


@pytest.mark.parametrize("method", ["open", "offer", "send"])
def test_what_fails_at_the_learner_costs_the_transfer_and_not_the_learner(
    system: System, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no such device")

    if method == "open":
        system.pool._exchange = WeightExchange(
            system.pool._workers,
            POLICY.model_copy(update={"weight_transfer_timeout_s": 0.2}),
        )
        monkeypatch.setattr("actors.weight_outlet.make_sender", fail)
    else:
        monkeypatch.setattr(system.learner.actor._outlet._sender, method, fail)
    system.train(2)
    failure = system.send(2)
    assert failure is not None
    assert failure.startswith("learner: no such device")
    assert "from now on" not in failure
    assert system.pool.sends_directly


def test_what_fails_twice_in_a_row_is_not_tried_again(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no such device")

    system.pool._exchange = WeightExchange(
        system.pool._workers, POLICY.model_copy(update={"weight_transfer_timeout_s": 0.2})
    )
    with monkeypatch.context() as patched:
        patched.setattr("actors.weight_outlet.make_sender", fail)
        system.train(2)
        assert "from now on" not in str(system.send(2))
        again = system.send(2)
    assert again is not None
    assert again.endswith("; as all will from now on, after 2 failures in a row")
    assert not system.pool.sends_directly


def test_ipc_between_two_gpus_is_refused(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.pool._exchange = WeightExchange(
        system.pool._workers, POLICY.model_copy(update={"weight_transfer": "ipc"})
    )
    monkeypatch.setattr(system.learner.actor, "open_transfer", lambda where: "GPU-0")
    for handle, gpu in zip(system.handles, ("GPU-0", "GPU-1"), strict=True):
        monkeypatch.setattr(handle.actor, "join_transfer", lambda where, gpu=gpu: gpu)
    with pytest.raises(
        ConfigError, match="the learner and the rollout workers are not on the same"
    ):
        system.send(1)


@pytest.mark.parametrize("failure", [None, "rollout worker 0: it died"])
def test_an_arm_says_so_and_takes_the_object_store_where_a_transfer_failed(
    failure: str | None,
) -> None:
    said: list[str] = []
    arm: Any = Arm.__new__(Arm)
    arm.__dict__.update(
        context=SimpleNamespace(
            config=SimpleNamespace(policy=POLICY), reporter=SimpleNamespace(line=said.append)
        ),
        config=SimpleNamespace(name="linear"),
        seconds={},
        _learner=object(),
        _rollouts=SimpleNamespace(
            sends_directly=True, send_weights=lambda learner, step, answer: failure
        ),
        _new_weights=lambda: ["bucket"],
        _unloaded=None,
    )
    arm.refresh(3)
    assert arm.step == 3
    if failure is None:
        assert (arm._unloaded, said) == (None, [])
    else:
        assert arm._unloaded[:2] == (["bucket"], 3)
        assert said == [
            "  arm linear: step 3: weights go through the object store (rollout worker 0: it died)"
        ]
