"""Which errors of Ray count as a lost actor, and what is done then; Ray itself is not started."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout_pool import RolloutPool
from actors.supervision import InputLostError, KilledAtStartError, SupervisedActor, call
from jobs import train_policy
from jobs.arm import Arm, LearnerWentBack
from morlaif_ray.errors import ActorLostError

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.unit
LOST = [
    ray.exceptions.ActorDiedError(),
    ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."),
    ray.exceptions.ActorUnschedulableError("no node has a GPU"),
    ray.exceptions.ObjectReconstructionFailedError("00ff", None, "call site"),  # the answer itself
]
GONE = ray.exceptions.RayTaskError(
    "load_buckets", "Traceback", ray.exceptions.OwnerDiedError("00ff", None, "call site")
)


class Handle:
    """An actor handle whose answers are known beforehand: an error is raised by `ray.get`, all else returned."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._answers.pop(0))


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Handles that were killed."""

    def get(reference: Any, timeout: float | None = None) -> Any:
        if isinstance(reference, Exception):
            raise reference
        return reference

    handles: list[Any] = []
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", handles.append)
    return handles


def supervised(*handles: Handle) -> SupervisedActor:
    left = list(handles)
    return SupervisedActor(
        "panel", lambda: left.pop(0), max_restarts=2, start_timeout_s=1.0, call_timeout_s=1.0
    )


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_call_is_repeated_after_every_kind_of_loss(error: Exception) -> None:
    actor = supervised(
        Handle(error), Handle(error), Handle(0, 16)
    )  # lost, lost at its start, sound
    assert call(actor, "score") == 16
    assert actor.num_restarts == 2


RAISED = ray.exceptions.RayActorError(
    None, "The actor died because of an error raised in its creation task\nValueError: no", True
)


@pytest.mark.parametrize("error", [*LOST[1:], RAISED], ids=lambda error: type(error).__name__)
def test_an_actor_that_cannot_start_is_named_at_once(error: Exception) -> None:
    with pytest.raises(ActorLostError, match=r"^panel did not start: "):
        supervised(Handle(error), Handle(0)).wait_ready()


def test_an_actor_killed_at_its_first_start_is_started_again_within_the_budget() -> None:
    actor = supervised(Handle(LOST[0]), Handle(0))
    actor.wait_ready()
    assert actor.num_restarts == 1
    with pytest.raises(ActorLostError, match=r"panel died 3 times .*restart budget is 2"):
        supervised(Handle(LOST[0]), Handle(LOST[0]), Handle(LOST[0])).wait_ready()


def given(answers: list[Exception | None]) -> Any:
    """A function that raises these in turn; after them, and for None, nothing."""

    def act(*arguments: Any) -> None:
        error = answers.pop(0) if answers else None
        if error is not None:
            raise error

    return act


def arm_with(
    *learners: Handle, budget: int = 2, loads: list[Exception | None] | None = None
) -> Any:
    """As much of an arm as asks and restores a learner; `said` and `record` tell what it did."""
    arm: Any = Arm.__new__(Arm)
    said: list[str] = []
    went_back: list[int] = []
    left = list(learners)
    arm.__dict__.update(
        context=SimpleNamespace(
            config=SimpleNamespace(
                policy=SimpleNamespace(max_restarts=budget, call_timeout_s=1.0),
                cluster=SimpleNamespace(start_timeout_s=1.0),
            ),
            reporter=SimpleNamespace(line=said.append),
        ),
        config=SimpleNamespace(name="linear"),
        work=Path("unused"),
        ahead=SimpleNamespace(drop=lambda: None),
        said=said,
        went_back=went_back,
        _record=SimpleNamespace(go_back=went_back.append),
        scorer=SimpleNamespace(restore=lambda state: None),
        _rollouts=SimpleNamespace(load_weights=given(loads or [])),
        _new_weights=lambda: [],
        _spawn_learner=lambda: left.pop(0),
        _restarts=0,
        _learner=left.pop(0),
    )
    return arm


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_learner_is_restored_after_every_kind_of_loss(error: Exception) -> None:
    arm = arm_with(Handle(error), Handle(4, [], {}))
    with pytest.raises(LearnerWentBack):
        arm._ask("update")
    assert (arm.step, arm.went_back, arm._restarts) == (4, [4], 1)


def test_input_that_is_gone_is_told_apart_from_an_actor_that_is_gone() -> None:
    actor = supervised(Handle(GONE))
    with pytest.raises(
        InputLostError, match=r"^panel: what score needs was lost with the node or process that"
    ):
        call(actor, "score")
    assert actor.num_restarts == 0


def test_a_worker_whose_new_weights_are_gone_at_its_restart_takes_those_that_come_next() -> None:
    pool: Any = RolloutPool.__new__(RolloutPool)
    pool._weights, pool._version = ["lost"], 3
    pool._policy = SimpleNamespace(call_timeout_s=1.0)
    handles = [Handle(LOST[0]), Handle(0, GONE, 4)]
    worker = supervised(*handles)
    worker._after_start = pool._refresh
    pool._workers = [worker]
    with pytest.raises(InputLostError, match=r"^rollout worker: what load_buckets needs was lost"):
        call(worker, "generate")
    pool.load_weights(["fresh"], 4)
    assert worker.num_restarts == 1


def test_a_learner_goes_back_where_its_weights_are_gone_on_their_way() -> None:
    lost = [InputLostError("what load_buckets needs was lost"), None]
    arm = arm_with(Handle(), Handle(4, [], {}), Handle(2, [], {}), loads=lost)
    arm.go_back("killed")
    assert (arm.step, arm.went_back, arm._restarts) == (2, [4, 2], 2)
    assert "learner lost (what load_buckets needs was lost)" in arm.said[1]
    arm = arm_with(Handle(GONE), Handle(4, [], {}))
    with pytest.raises(LearnerWentBack):
        arm._ask("update")
    assert "learner lost (what update needs was lost with the node" in arm.said[0]


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an arm whose learners are these, not one of which has started."""
    rollouts = SimpleNamespace(load_weights=lambda weights, step: None)
    monkeypatch.setattr("jobs.arm.RolloutPool", lambda *arguments: rollouts)
    monkeypatch.setattr("jobs.arm.sft_model_path", lambda context: "unused")

    def make(*learners: Handle) -> Any:
        arm = arm_with(Handle(), *learners)
        arm.context.config.policy.num_rollout_workers = 1
        return arm

    return make


@pytest.mark.parametrize("error", [*LOST[1:], RAISED], ids=lambda error: type(error).__name__)
def test_a_learner_that_cannot_start_is_named_at_once(error: Exception, starting: Any) -> None:
    with pytest.raises(ActorLostError, match=r"^arm 'linear': the learner did not start: "):
        starting(Handle(error), Handle(4, [], {})).start()


def test_a_learner_killed_at_its_first_start_is_started_again(starting: Any) -> None:
    arm = starting(Handle(LOST[0]), Handle(4, [], {}))
    assert (arm.start(), arm._restarts) == (4, 1)


def test_a_learner_lost_in_its_restart_is_started_again_within_the_budget() -> None:
    lost, silent = LOST[0], ray.exceptions.GetTimeoutError()
    arm = arm_with(Handle(lost), Handle(lost), Handle(silent), Handle(6, [], {}), budget=3)
    with pytest.raises(LearnerWentBack):
        arm._ask("update")
    assert (arm.step, arm.went_back, arm._restarts) == (6, [6], 3)
    assert "learner lost (did not start in 1 s; " in arm.said[2]
    arm = arm_with(Handle(lost), Handle(lost), Handle(lost), budget=2)
    with pytest.raises(
        ActorLostError, match=r"the learner died 3 times \(last: did not start: .*max_restarts is 2"
    ):
        arm._ask("update")


def test_a_rank_killed_at_the_first_start_is_started_again_with_its_group(starting: Any) -> None:
    said = KilledAtStartError("PPO learner: a rank was lost (rank 1: The actor died)")
    arm = starting(
        Handle(ray.exceptions.RayTaskError("ping", "Traceback", said)), Handle(4, [], {})
    )
    assert (arm.start(), arm._restarts) == (4, 1)
    assert "learner lost (did not start: PPO learner: a rank was lost (rank 1: " in arm.said[0]


@pytest.mark.parametrize("fails", ["check_parity", "take", "checkpoint"])
def test_weights_that_are_gone_lead_the_loop_back_to_the_last_checkpoint(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run of four steps, checkpoints at 2 and 4; the input of one verb is gone once, after three steps."""
    monkeypatch.setattr(train_policy, "open_tracker", lambda *arguments: quiet)
    quiet = SimpleNamespace(log=lambda *a: None, close=lambda: None, note=lambda text: None)
    policy = SimpleNamespace(parity_every=1, samples_every=0, checkpoint_every=2)
    batch = SimpleNamespace(policy_version=0)
    metrics = {"reward_mean": 0.0, "kl_mean": 0.0}
    left, updated = [fails], []
    arm: Any = SimpleNamespace(
        context=SimpleNamespace(config=SimpleNamespace(policy=policy), run_dir=Path("unused")),
        config=SimpleNamespace(name="linear"),
        num_steps=5,
        step=0,
        seconds={},
        gauges={},
        start=lambda: 0,
        measure=lambda seconds: None,
        await_rollouts=lambda staleness: None,
        record=lambda step, metrics: None,
        finish=lambda: None,
    )

    def verb(name: str, value: Any = None) -> Any:
        def act(*arguments: Any) -> Any:
            if arm.step >= 3 and name in left:
                left.remove(name)
                raise InputLostError("rollout worker 1: what load_buckets needs was lost")
            return value

        return act

    def update(step: int, *arguments: Any) -> dict[str, float]:
        updated.append(step)
        return metrics

    def go_back(cause: str) -> None:
        assert "what load_buckets needs" in cause
        arm.step = 2

    arm.check_parity, arm.checkpoint = verb("check_parity"), verb("checkpoint")
    arm.ahead = SimpleNamespace(take=verb("take", (batch, None)))
    arm.update, arm.go_back = update, go_back
    arm.refresh = lambda step: setattr(arm, "step", step)
    done: list[int] = []
    quiet.advance = done.append
    train_policy.run_arm(arm, quiet, quiet, threading.Event())  # type: ignore[arg-type]
    lost_after = [0, 1, 2, 3] if fails == "checkpoint" else [0, 1, 2]
    assert updated == [*lost_after, 2, 3, 4]
    assert sum(done) == 5


@pytest.mark.parametrize("fails", ["check_parity", "take"])
def test_the_steps_so_far_are_kept_when_rollouts_or_panel_are_lost_for_good(fails: str) -> None:
    did: list[str] = []

    def verb(name: str) -> Any:
        def act(*arguments: Any) -> None:
            did.append(name)
            if name == fails:
                raise ActorLostError("panel died 3 times")
            if name == "checkpoint":
                raise OSError("no space left")  # must not hide the cause

        return act

    policy = SimpleNamespace(parity_every=1)
    arm: Any = SimpleNamespace(
        context=SimpleNamespace(config=SimpleNamespace(policy=policy)),
        check_parity=verb("check_parity"),
        ahead=SimpleNamespace(take=verb("take")),
        checkpoint=verb("checkpoint"),
    )
    with pytest.raises(ActorLostError, match="panel died 3 times"):
        train_policy._next_batch(arm, 7)
    assert did[-2:] == [fails, "checkpoint"]


@pytest.mark.parametrize("busy_waits", [0, 3])
def test_a_call_that_waits_behind_others_is_no_silence(
    busy_waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wait uses up its time-out; in the first few the actor answers calls of other threads."""
    actor = supervised(Handle("queued"), Handle(0, 16))
    now, waits = [100.0], [0]

    def get(reference: Any, timeout: float) -> Any:
        if reference != "queued":
            return reference
        waits[0] += 1
        now[0] += timeout
        if waits[0] <= busy_waits:
            actor.heard = now[0] - 0.25
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr("actors.supervision.time.monotonic", lambda: now[0])
    assert call(actor, "score") == 16
    assert actor.num_restarts == 1  # in the end it was silent
    assert waits[0] == busy_waits + 1
    assert now[0] == 101.0 + 0.75 * busy_waits  # one time-out after its last answer, no later
