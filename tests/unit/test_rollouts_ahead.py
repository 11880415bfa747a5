"""One step ahead: which batch a step gets, when weights may change, and what a stopped run finds again."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs.arm_scoring import PanelStream, ScoredBatch
from jobs.rollouts_ahead import Batch, RolloutsAhead, load_in_flight, save_in_flight
from morlaif_ray.errors import ArtifactError, NumericalError
from morlaif_ray.types import RolloutBatch, ScoreTable

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]
WAIT_S = 30.0


def make_batch(step: int, version: int, num: int = 3) -> Batch:
    rng = np.random.default_rng(step)
    responses = RolloutBatch(
        prompts=tuple(f"\n\nHuman: {row}|\u00e9\n\nAssistant:" for row in range(num)),
        responses=tuple(f" step {step} row {row}" for row in range(num)),
        tokens_BL=rng.integers(0, 9, (num, 5)),
        prompt_lengths_B=np.full(num, 2),
        response_lengths_B=np.arange(num) % 3 + 1,
        logprobs_BT=-rng.random((num, 3)).astype(np.float32),
        truncated_B=np.arange(num) % 2 == 0,
        policy_version=version,
    )
    scores = rng.normal(size=(num, 4))
    scores[0, 1] = np.nan
    return responses, ScoredBatch(rng.normal(size=num), scores, 2 * scores)


def assert_equal(left: Batch, right: Batch) -> None:
    for a, b in zip(left, right, strict=True):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(x, np.ndarray):
                np.testing.assert_array_equal(x, y)
                assert x.dtype == y.dtype
            else:
                assert x == y


class Sampler:
    """Makes a batch of the version that the workers hold at the moment."""

    def __init__(self) -> None:
        self.version = 0
        self.made: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, step: int) -> Batch:
        version = self.version
        assert self.gate.wait(WAIT_S)
        self.made.append(step)
        return make_batch(step, version)


def ahead(sampler: Sampler, folder: Path, staleness: int = 1) -> RolloutsAhead:
    return RolloutsAhead(sampler, staleness, folder, num_kept=2)


def test_synchronous_batches_are_sampled_when_they_are_taken(tmp_path: Path) -> None:
    sampler = Sampler()
    rollouts = ahead(sampler, tmp_path, staleness=0)
    for step in range(3):
        batch, _ = rollouts.take(step)
        assert batch.policy_version == step
        rollouts.begin(step + 1)
        assert sampler.made == list(range(step + 1))  # nothing is sampled ahead
        assert rollouts.wait()
        sampler.version += 1
        rollouts.save(step + 1)
    assert list(tmp_path.iterdir()) == []


def test_one_step_off_every_batch_but_the_first_is_one_version_old(tmp_path: Path) -> None:
    sampler = Sampler()
    rollouts = ahead(sampler, tmp_path)
    versions = []
    for step in range(5):
        batch, _ = rollouts.take(step)
        versions.append(batch.policy_version)
        rollouts.begin(step + 1)
        rollouts.wait()
        sampler.version += 1
    assert versions == [0, 0, 1, 2, 3]


def test_the_wait_before_new_weights_lasts_until_nothing_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler()
    rollouts = ahead(sampler, tmp_path)
    rollouts.take(0)
    sampler.gate.clear()
    rollouts.begin(1)
    opened: list[bool] = []
    assert rollouts._next is not None
    wait_for_it = rollouts._next[1].exception

    def look_and_open() -> object:  # where `wait` begins to wait, and not before
        opened.append(True)
        sampler.gate.set()
        return wait_for_it()

    monkeypatch.setattr(rollouts._next[1], "exception", look_and_open)
    assert not rollouts.wait()  # it was not ready at once
    assert opened == [True]
    assert rollouts.wait_s > 0.0
    assert rollouts.wait()


def test_the_wait_counts_what_came_before_the_update_and_what_came_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("jobs.rollouts_ahead.time.monotonic", lambda: now[0])

    def make(step: int) -> Batch:
        now[0] += 2.0
        return make_batch(step, version=step)

    rollouts = RolloutsAhead(make, 0, tmp_path, 2)
    for step in range(2):  # the second step begins anew
        rollouts.take(step)
        now[0] += 5.0  # the update
        rollouts.wait()
        assert rollouts.wait_s == 2.0


def test_a_resumed_run_takes_the_batch_that_was_in_flight_from_disk(tmp_path: Path) -> None:
    sampler = Sampler()
    rollouts = ahead(sampler, tmp_path)
    for step in range(3):
        rollouts.take(step)
        rollouts.begin(step + 1)
        rollouts.wait()
        sampler.version += 1
    rollouts.save(3)
    sampler.made.clear()
    resumed = ahead(sampler, tmp_path)
    assert_equal(resumed.take(3), make_batch(3, version=2))
    assert sampler.made == []


def test_after_a_step_back_the_batch_of_the_checkpoint_is_used_again(tmp_path: Path) -> None:
    sampler = Sampler()
    rollouts = ahead(sampler, tmp_path)
    rollouts.take(0)
    rollouts.begin(1)
    rollouts.wait()
    rollouts.save(1)
    sampler.version = 1
    rollouts.take(1)
    rollouts.begin(2)
    rollouts.drop()
    assert_equal(rollouts.take(1), make_batch(1, version=0))
    fresh = ahead(Sampler(), tmp_path / "never saved")  # no checkpoint at all: from the start
    assert fresh.take(0)[0].policy_version == 0


def test_an_error_beside_the_update_is_raised_where_the_batch_is_taken(tmp_path: Path) -> None:
    def fail(step: int) -> Batch:
        raise NumericalError(f"no batch {step}")

    rollouts = RolloutsAhead(fail, 1, tmp_path, 2)
    rollouts.begin(1)
    rollouts.wait()
    with pytest.raises(NumericalError, match="no batch 1"):
        rollouts.take(1)


def test_a_batch_older_than_allowed_is_a_bug(tmp_path: Path) -> None:
    rollouts = RolloutsAhead(lambda step: make_batch(step, version=0), 0, tmp_path, 2)
    with pytest.raises(AssertionError, match="step 2: responses are 2 versions old"):
        rollouts.take(2)


def test_files_of_old_checkpoints_go_and_a_missing_or_damaged_one_is_named(tmp_path: Path) -> None:
    sampler = Sampler()
    folder = tmp_path / "arm" / "in_flight"
    rollouts = ahead(sampler, folder)
    for step in range(8, 12):
        rollouts._next = None
        rollouts.begin(step)
        rollouts.save(step)
    assert sorted(path.name for path in folder.iterdir()) == ["10.npz", "11.npz"]
    with pytest.raises(ArtifactError, match=r"9\.npz: the responses in flight .* are missing"):
        load_in_flight(folder / "9.npz")
    whole = (folder / "11.npz").read_bytes()
    (folder / "11.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"11\.npz: damaged"):
        load_in_flight(folder / "11.npz")


def test_the_batch_of_a_checkpoint_that_is_kept_as_the_best_stays(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.00000001").mkdir()  # the name that the learner gives it
    rollouts = ahead(Sampler(), tmp_path / "in_flight")
    for step in range(1, 5):
        rollouts._next = None
        rollouts.begin(step)
        rollouts.save(step)
    names = sorted(path.name for path in (tmp_path / "in_flight").iterdir())
    assert names == ["1.npz", "3.npz", "4.npz"]


def test_a_batch_survives_the_disk_bit_for_bit(tmp_path: Path) -> None:
    batch = make_batch(4, version=3)
    save_in_flight(tmp_path / "4.npz", batch)
    assert_equal(load_in_flight(tmp_path / "4.npz"), batch)


# ---------------------------------------------------------------- scoring while others are sampled


class Lengths:
    """A panel whose scores show which texts it was asked about together."""

    columns = ()

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def submit(self, texts: Sequence[str]) -> Any:
        self.asked.append(list(texts))
        scores = [[float(text.split()[-1]), float(len(texts))] for text in texts]
        table = ScoreTable(np.array(scores), ("row", "size"))
        return SimpleNamespace(result=lambda: table)


def part_of(batch: RolloutBatch, first: int, num: int) -> RolloutBatch:
    names = [field.name for field in dataclasses.fields(batch)]
    values = {name: getattr(batch, name) for name in names}
    rows = slice(first, first + num)
    return RolloutBatch(
        **{name: v if isinstance(v, int) else v[rows] for name, v in values.items()}
    )


@pytest.mark.parametrize("order", [(0, 2, 4, 6), (6, 4, 2, 0), (2, 6, 0, 4)])
def test_the_same_rows_are_scored_together_whoever_finishes_first(order: tuple[int, ...]) -> None:
    batch = make_batch(0, 0, num=7)[0]
    panel = Lengths()
    stream = PanelStream(panel.submit, 7, size=3)
    for first in order:
        stream.take(first, part_of(batch, first, min(2, 7 - first)))
    scores = stream.scores()
    assert scores[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert scores[:, 1].tolist() == [3, 3, 3, 3, 3, 3, 1]


def test_a_group_is_scored_before_the_last_row_is_sampled() -> None:
    batch = make_batch(0, 0, num=4)[0]
    panel = Lengths()
    stream = PanelStream(panel.submit, 4, size=2)
    stream.take(0, part_of(batch, 0, 2))
    assert len(panel.asked) == 1
    stream.take(2, part_of(batch, 2, 2))
    assert stream.scores()[:, 0].tolist() == [0, 1, 2, 3]
