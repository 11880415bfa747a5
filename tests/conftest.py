"""What all tests share: an environment that no test leaks, a Ray that the tests own, and one finished smoke run."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from actors.session import prepare_environment

# Ray reads the authentication mode when it is imported and the token once per process: both before the first import.
prepare_environment()
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from tests.jobs.commands import FinishedRun, run_small  # noqa: E402
from tests.local_ray import local_ray  # noqa: E402

# Hypothesis' own: the same examples in every run, and no limit of 200 ms for one, which a busy machine would exceed.
settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="module")
def _environment_is_restored() -> Iterator[None]:
    """A module's Ray may set variables (token paths, addresses) that would mislead the next module's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A local Ray for the tests of one module."""
    with local_ray():
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """`morlaif run` on the smoke config, once per test session, in a process of its own. Read only: use `run_copy`."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers of one session share the folder above theirs
        folder = folder.parent
    with FileLock(folder / "finished.lock"):
        return FinishedRun.read(folder) or run_small(folder / "finished").write(folder)


@pytest.fixture
def run_copy(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A run folder of one's own with all stages published."""
    return Path(shutil.copytree(finished_run.run_dir, tmp_path / "run"))
