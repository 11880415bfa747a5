"""Arrays that stay in the object store: the learner gets the bits that would have travelled, the driver none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.rollout_pool import RolloutPool, join_batches
from actors.stored_rollouts import StoredRollouts, split, whole
from actors.supervision import SupervisedActor, map_over
from jobs.arm_scoring import texts_of
from morlaif_ray.rl.generation import SamplingSettings
from morlaif_ray.types import GenerationRequest, RolloutBatch
from tests.unit.rl.conftest import make_batch

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.unit


class Store:
    """The object store, as a dict that counts what is taken from it."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}
        self.fetched: list[str] = []

    def put(self, value: Any) -> str:
        self.held[f"object {len(self.held)}"] = value
        return f"object {len(self.held) - 1}"

    def get(self, references: Any, timeout: float | None = None) -> Any:
        if isinstance(references, list):
            return [self.get(reference) for reference in references]
        self.fetched.append(references)
        if isinstance(self.held[references], Exception):
            raise self.held[references]
        return self.held[references]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(ray, "get", made.get)
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (list(refs)[-1:], list(refs)[:-1]))
    monkeypatch.setattr(ray, "kill", lambda handle: None)
    return made


class Worker:
    """Answers each call with its batch in two results; the first life of a worker may lose a call."""

    def __init__(self, store: Store, batches: dict[str, RolloutBatch], loses: str = "") -> None:
        self._store = store
        self._batches = batches
        self._loses = loses
        self.ping = SimpleNamespace(remote=lambda: store.put(0))

    @property
    def generate_stored(self) -> Any:
        def options(num_returns: int) -> Any:
            assert num_returns == 2
            return SimpleNamespace(remote=self._generate)

        return SimpleNamespace(options=options)

    def _generate(self, requests: Sequence[GenerationRequest], settings: Any) -> list[str]:
        name = requests[0].prompt
        if name == self._loses:
            lost = ray.exceptions.ActorDiedError()
            return [self._store.put(lost), self._store.put(lost)]
        return [self._store.put(part) for part in split(self._batches[name])]


def assert_equal(left: RolloutBatch, right: RolloutBatch) -> None:
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        np.testing.assert_array_equal(a, b, err_msg=field.name)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None), field.name


def named(seed: int, num: int, longest: int) -> RolloutBatch:
    batch = make_batch(seed, num, longest)
    texts = [f"{seed}.{row}" for row in range(num)]
    return dataclasses.replace(batch, prompts=tuple(texts), responses=tuple(f" {t}" for t in texts))


PARTS = [named(0, 3, 5), named(1, 2, 9), named(2, 4, 7)]


def test_what_is_fetched_is_the_batch_that_would_have_travelled(store: Store) -> None:
    told = [split(part) for part in PARTS]
    stored = StoredRollouts.join([(first, store.put(second)) for first, second in told])
    expected = join_batches(PARTS)
    assert (len(stored), stored.responses) == (9, expected.responses)
    assert texts_of(stored) == texts_of(expected)
    assert store.fetched == []  # nothing of it needed the arrays
    assert_equal(whole(stored, 1.0), expected)
    assert_equal(whole(expected, 1.0), expected)
    other = dataclasses.replace(told[1][0], policy_version=7)
    with pytest.raises(AssertionError, match=r"several policy versions: \[0, 7\]"):
        StoredRollouts.join([(told[0][0], "a"), (other, "b")])


def test_a_pool_hears_of_parts_without_their_arrays_also_when_a_worker_is_lost(
    store: Store,
) -> None:
    batches = {part.prompts[0]: part for part in PARTS}
    lives = [Worker(store, batches, loses=PARTS[1].prompts[0]), Worker(store, batches)]
    pool = RolloutPool.__new__(RolloutPool)
    worker = SupervisedActor(
        "worker", lambda: lives.pop(0), max_restarts=1, start_timeout_s=1.0, call_timeout_s=9.0
    )
    rows = [range(0, 3), range(3, 5), range(5, 9)]
    pool.__dict__.update(_workers=[worker], _in_flight=2, _parts=lambda num: rows)
    requests = [GenerationRequest(text, 0) for part in PARTS for text in part.prompts]
    heard: list[tuple[int, int]] = []
    stored = pool.generate_stored(
        requests, SamplingSettings(8), lambda first, told: heard.append((first, len(told)))
    )
    assert worker.num_restarts == 1
    assert sorted(heard) == [(0, 3), (3, 2), (5, 4)]
    arrays = [name for name in store.fetched if isinstance(store.held[name], tuple)]
    assert arrays == []
    assert_equal(stored.fetch(1.0), join_batches(PARTS))


def test_one_result_per_call_stays_as_it_was(store: Store) -> None:
    squares = SimpleNamespace(remote=lambda value: store.put(value * value))
    actor = SupervisedActor(
        "worker",
        lambda: SimpleNamespace(work=squares),
        max_restarts=0,
        start_timeout_s=1.0,
        call_timeout_s=9.0,
    )
    assert map_over([actor], "work", [(1,), (2,), (3,)]) == [1, 4, 9]


def test_a_batch_in_flight_is_written_by_the_learner_from_its_own_copy(
    store: Store, tmp_path: Path
) -> None:
    from actors.ppo_learner import PPOLearnerActor
    from morlaif_ray.rl.in_flight import read_rollouts

    stored = StoredRollouts.join([(a, store.put(b)) for a, b in map(split, PARTS)])
    learner = PPOLearnerActor.__new__(PPOLearnerActor)
    learner._settings = SimpleNamespace(config=SimpleNamespace(call_timeout_s=1.0))  # type: ignore[assignment]
    scores = {"reward_B": np.arange(9.0), "raw_BK": np.full((9, 2), np.nan)}
    learner.write_rollouts(tmp_path / "3.npz", stored, scores)
    batch, back = read_rollouts(tmp_path / "3.npz")
    assert_equal(batch, join_batches(PARTS))
    assert sorted(back) == sorted(scores)
    np.testing.assert_array_equal(back["raw_BK"], scores["raw_BK"])
