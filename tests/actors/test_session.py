"""What a job does around its Ray, without starting one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from actors import session
from actors.training import ProgressFile, _interruptible, find_cause
from morlaif_ray.errors import ArtifactError, NumericalError

pytestmark = pytest.mark.actors


def test_session_folders_of_killed_jobs_are_removed_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SESSION_ROOT", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owners = {"morlaif-dead": str(ended.pid), "morlaif-live": str(os.getpid()), "morlaif-odd": "x"}
    for name, owner in owners.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / session.OWNER).write_text(owner)
    (tmp_path / "morlaif-unknown").mkdir()
    session._remove_orphans()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"morlaif-live", "morlaif-odd", "morlaif-unknown"}


def test_the_jobs_own_sigterm_handler_survives_the_start_of_ray() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with session._keeping_sigterm():
        signal.signal(signal.SIGTERM, lambda *_: None)  # as ray.init does
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_ray_that_is_slow_to_come_up_is_started_again_and_other_errors_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    slow = Exception("The current node timed out during startup. This could happen because ...")
    errors: list[Exception | None] = []
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def init(**options: int) -> None:
        assert options == {"num_cpus": 3}
        if (error := errors.pop(0)) is not None:
            raise error

    monkeypatch.setattr(ray, "init", init)
    errors += [slow, None]
    session.start_ray(num_cpus=3)
    errors += [slow, slow, slow]
    with pytest.raises(Exception, match="timed out during startup"):
        session.start_ray(num_cpus=3)
    errors += [ValueError("no such option")]
    with pytest.raises(ValueError, match="no such option"):
        session.start_ray(num_cpus=3)
    assert errors == []


def test_work_beside_the_main_thread_hands_over_its_error() -> None:
    def fail() -> None:
        raise NumericalError("the loss is NaN")

    with pytest.raises(NumericalError, match="the loss is NaN"):
        _interruptible(fail)


def test_our_own_error_is_found_inside_any_wrapping() -> None:
    ours = ArtifactError("damaged")
    outer = RuntimeError("Training failed")
    outer.__cause__ = ValueError("wrapped")
    outer.__cause__.__context__ = ours
    assert find_cause(outer) is ours
    assert str(find_cause(RuntimeError("alone"))) == "alone"


def test_a_progress_file_says_how_far_it_is_and_a_missing_or_torn_one_says_nothing(
    tmp_path: Path,
) -> None:
    progress = ProgressFile(tmp_path / "p.json")
    assert progress.read() == (0, 0)
    progress.write(3, 10)
    progress.write(4, 10)  # too soon after the last one
    assert progress.read() == (3, 10)
    progress.write(10, 10)  # the end is always written
    assert progress.read() == (10, 10)
    (tmp_path / "p.json").write_text("[1")
    assert progress.read() == (0, 0)
