"""`morlaif` in the process of the test, for commands that must end before anything starts."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest

from jobs.cli import main
from tests.jobs.commands import Ended

FIRST_SECONDS = 60.0
"""Nothing here loads a model or starts Ray: it takes well below one second. The limit is for a machine that is many
times slower, and busy."""


@pytest.fixture
def morlaif(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Ended]]:
    """Runs the command in this process; checks that it fails fast, in one line, without Ray."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def no_ray(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("actors.session._start_local", no_ray)
    monkeypatch.setattr("actors.session._attach", _only_checks_address)

    def run(*words: str) -> Ended:
        started = time.monotonic()
        code = main(list(words))
        assert time.monotonic() - started < FIRST_SECONDS
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert code != 0
        assert printed.out == ""
        assert errors == printed.err.splitlines()[-1:]
        return Ended(code, errors[0].removeprefix("error: "))

    yield run
    signal.signal(signal.SIGTERM, handler)


def _only_checks_address(address: str, cluster: object, say: object) -> None:
    from actors.session import check_reachable

    check_reachable(address, 1.0)
    raise AssertionError("Ray was reached")
