"""A learner of two ranks behind one handle, on a real local Ray: like one rank, and ended as a whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.ppo_learner import spawn_ppo_learner
from actors.supervision import cause_of
from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer, save_pretrained
from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import NumericalError
from morlaif_ray.rl.generation import TransformersEngine
from morlaif_ray.rl.weight_broadcast import Rendezvous
from tests.opinions import give_opinions
from tests.processes import WAIT_S, wait_until_gone
from tests.unit.rl.conftest import MAX_LENGTH, WORDS, make_batch

pytestmark = [
    pytest.mark.actors,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(600),
]
SETTINGS = {
    "batch_size": 6,
    "num_epochs": 2,
    "learning_rate": 1e-3,
    "checkpoint_every": 1,
    "call_timeout_s": 60.0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("group") / "model"
    tokenizer = build_word_tokenizer([WORDS], vocabulary_size=50, max_length=MAX_LENGTH)
    size = ScratchModel(width=16, num_layers=2, num_heads=2, max_length=MAX_LENGTH)
    made = build_scratch_model(size, tokenizer, seed=3)
    save_pretrained(give_opinions(made), tokenizer, folder)
    return str(folder)


@pytest.fixture
def spawn(model: str, tmp_path: Path) -> Callable[..., Any]:
    import ray

    handles: list[Any] = []

    def start(name: str, **changes: Any) -> Any:
        config = PolicyConfig(**{**SETTINGS, **changes})
        folder = tmp_path / name / "checkpoint"
        handles.append(
            spawn_ppo_learner(model, config, seed=1, dtype="float32", checkpoint_dir=folder)
        )
        return handles[-1]

    yield start
    for handle in handles:
        ray.kill(handle)


def ask(handle: Any, method: str, *arguments: Any) -> Any:
    import ray

    return ray.get(getattr(handle, method).remote(*arguments), timeout=WAIT_S)


def train(handle: Any, steps: range) -> None:
    for step in steps:
        rewards = np.random.default_rng(step).normal(size=6)
        ask(handle, "update", make_batch(step), rewards)
        ask(handle, "save_checkpoint")


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


def sent_directly(learner: Any, model: str) -> dict[str, Any]:
    """What an engine in this process holds after a direct transfer. A second one, which it does not take part in, fails
    and leaves the learner's ranks in step."""
    import ray

    engine = TransformersEngine.from_path(model)
    where = Rendezvous("gloo", ask(learner, "transfer_address"), 1, 2, 4096, 30.0)
    opening = learner.open_transfer.remote(where)
    engine.join_transfer(where)
    assert ray.get(opening, timeout=WAIT_S) == ""
    message = ask(learner, "offer_weights")
    sending = learner.send_weights.remote(message)
    engine.receive_weights(message)
    assert ray.get(sending, timeout=WAIT_S) is None
    assert engine.policy_version == ask(learner, "ping") == 3
    assert engine._incoming is not None
    engine._incoming[0].close()
    assert str(ask(learner, "send_weights", message)).startswith("learner: ")
    return {name: p.detach().numpy() for name, p in engine.model.named_parameters()}


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_group_that_loses_a_rank_ends_and_its_successor_reaches_the_same_bytes(
    spawn: Callable[..., Any], model: str, tmp_path: Path, fsdp: bool
) -> None:
    import ray

    undisturbed = spawn("undisturbed", learner_ranks=2, fsdp=fsdp)
    train(undisturbed, range(3))
    expected = ask(undisturbed, "weights")
    assert_same(sent_directly(undisturbed, model), expected)
    ask(undisturbed, "save_model", str(tmp_path / "one"))

    group = spawn("disturbed", learner_ranks=2, fsdp=fsdp)
    train(group, range(2))
    first, second = ask(group, "pids")
    os.kill(second, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        train(group, range(2, 3))
    wait_until_gone(first)  # the group ended as a whole

    again = spawn("disturbed", learner_ranks=2, fsdp=fsdp)
    assert ask(again, "ping") == 2
    train(again, range(2, 3))
    assert_same(ask(again, "weights"), expected)
    ask(again, "save_model", str(tmp_path / "other"))
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "other")]
    assert files[0] == files[1]


def test_a_group_survives_an_error_that_all_its_ranks_meet_and_not_the_death_of_rank_zero(
    spawn: Callable[..., Any],
) -> None:
    import ray

    group = spawn("nan", learner_ranks=2)
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ask(group, "update", make_batch(0), np.array([0.0, 1.0, np.nan, 0.0, 0.0, 1.0]))
    cause = cause_of(caught.value)
    assert isinstance(cause, NumericalError)
    assert "PPO step 0: reward 2 is not finite; the samples are in " in str(cause)
    assert ask(group, "ping") == 0  # the group lives
    first, second = ask(group, "pids")
    os.kill(first, signal.SIGKILL)
    wait_until_gone(second)


def test_a_damaged_checkpoint_is_passed_over_with_a_note(
    spawn: Callable[..., Any], tmp_path: Path
) -> None:
    import ray

    learner = spawn("notes")
    train(learner, range(2))
    ray.kill(learner)
    (tmp_path / "notes" / "checkpoint" / "manifest.json").unlink()
    fresh = spawn("notes")
    assert ask(fresh, "ping") == 1
    notes = ask(fresh, "notes")
    assert len(notes) == 1
    assert notes[0].endswith(
        "checkpoint: damaged checkpoint (manifest.json is missing); going on from checkpoint.00000001"
    )
    assert ask(fresh, "notes") == []
