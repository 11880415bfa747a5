"""A learner's group that cannot form: rank 0 says at once which rank is lost and why. Ray itself is not started."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from actors.learner_ranks import OtherRanks
from actors.supervision import KilledAtStartError
from morlaif_ray.errors import ActorLostError, ArtifactError
from morlaif_ray.rl.ranks import Ranks

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.unit
UP, PENDING = "up", "pending"
KILLED = ray.exceptions.ActorDiedError()
DAMAGED = ray.exceptions.RayTaskError(
    "begin",
    "Traceback:\n  File x\nmorlaif_ray.errors.ArtifactError: model: damaged; make it again",
    ArtifactError("model: damaged; make it again"),
)


class Rank:
    """A rank that begins in time, never, or with the error that ended it."""

    def __init__(self, answer: Any) -> None:
        self.begin = SimpleNamespace(remote=lambda: answer)


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(references: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        ready = [reference for reference in references if reference != PENDING]
        return ready, [reference for reference in references if reference == PENDING]

    def get(reference: Any, timeout: float | None = None) -> Any:
        if isinstance(reference, Exception):
            raise reference
        if reference == PENDING:
            raise ray.exceptions.GetTimeoutError
        return reference

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr("actors.learner_ranks.CAUSE_TIMEOUT_S", 0.1)


def others(*answers: Any) -> OtherRanks:
    return OtherRanks([Rank(answer) for answer in answers])


def never() -> Ranks:
    """What joining does while a rank is missing."""
    threading.Event().wait()
    raise AssertionError


def test_a_rank_that_dies_before_it_joins_ends_the_start_with_its_own_cause() -> None:
    with pytest.raises(ActorLostError) as caught:
        others(PENDING, DAMAGED).begin(never, lambda ranks: None, 60.0)
    assert caught.value.message == (
        "PPO learner: a rank was lost (rank 2: model: damaged; make it again)"
    )
    assert type(caught.value) is ActorLostError  # the next one would meet the same
    with pytest.raises(KilledAtStartError, match=r"a rank was lost \(rank 1: The actor died unexp"):
        others(KILLED).begin(never, lambda ranks: None, 60.0)


def test_a_start_counts_as_killed_where_any_rank_was() -> None:
    """Rank 1 meets a closed connection because rank 2 was killed."""
    closed = ray.exceptions.RayTaskError("begin", "Traceback\nRuntimeError: closed", RuntimeError())
    with pytest.raises(
        KilledAtStartError, match=r"a rank was lost \(rank 1: RuntimeError: closed\)"
    ):
        others(closed, KILLED).begin(never, lambda ranks: None, 60.0)
    with pytest.raises(ActorLostError) as caught:
        others(closed, PENDING).begin(never, lambda ranks: None, 60.0)
    assert type(caught.value) is ActorLostError
    assert type(pickle.loads(pickle.dumps(KilledAtStartError("x")))) is KilledAtStartError


def test_a_rank_that_dies_after_it_joined_is_named_beside_what_rank_zero_met() -> None:
    def fail(ranks: Ranks) -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(ActorLostError) as caught:
        others(KILLED).begin(lambda: Ranks(0, 2), fail, 60.0)
    assert type(caught.value) is KilledAtStartError
    assert caught.value.message.startswith(
        "PPO learner: a rank was lost (rank 0: Connection closed by peer; rank 1: The actor died"
    )
    with pytest.raises(ActorLostError, match=r"rank 1: The actor died"):
        others(KILLED).begin(lambda: Ranks(0, 2), lambda ranks: None, 60.0)


def test_a_rank_that_never_comes_up_is_waited_for_no_longer_than_a_call() -> None:
    with pytest.raises(ActorLostError, match=r"a rank was lost \(one is not up after 60 s\)"):
        others(UP, PENDING).begin(lambda: Ranks(0, 3), lambda ranks: None, 60.0)


def test_an_error_of_ours_is_raised_as_it_is_and_ranks_without_others_just_join() -> None:
    def damaged(ranks: Ranks) -> None:
        raise ArtifactError("no model")

    with pytest.raises(ArtifactError, match="no model"):
        others(PENDING).begin(lambda: Ranks(0, 2), damaged, 60.0)
    with pytest.raises(RuntimeError, match="peer"):
        OtherRanks().begin(lambda: _raise(RuntimeError("peer")), lambda ranks: None, 60.0)
    made: list[Ranks] = []
    others(UP, UP).begin(lambda: Ranks(0, 3), made.append, 60.0)
    OtherRanks().begin(lambda: Ranks(1, 3), made.append, 60.0)
    assert made == [Ranks(0, 3), Ranks(1, 3)]


def _raise(error: Exception) -> Any:
    raise error
