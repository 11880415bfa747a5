"""The Batch API judge whose driver dies or whose connection is lost: every batch is found again and paid once."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.batch_journal import BatchJournal
from morlaif_ray.feedback.batch_provider import OpenAIBatchProvider
from morlaif_ray.feedback.questions import split_batches
from morlaif_ray.feedback.retry import RetryPolicy
from tests.fake_openai.batches import FakeBatchAPI
from tests.fake_openai.server import KEY
from tests.unit.feedback.batch_runs import collect, expected, feedback, labels, plan_of
from tests.unit.feedback.fakes import make_pairs

pytestmark = pytest.mark.unit


class Killed(BaseException):
    """Stands for the driver's death: nothing after it runs."""


def killed_when(call: str, after: bool) -> type[OpenAIBatchProvider]:
    """A provider whose first call of this name kills the driver before or after it reaches the other side."""

    class Deadly(OpenAIBatchProvider):
        pass

    def method(self: OpenAIBatchProvider, *arguments: object) -> object:
        if after:
            getattr(OpenAIBatchProvider, call)(self, *arguments)
        raise Killed

    setattr(Deadly, call, method)
    return Deadly


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", ["upload", "create", "status", "fetch"])
def test_a_driver_killed_at_any_step_resumes_and_pays_once(
    api: FakeBatchAPI, tmp_path: Path, call: str, after: bool
) -> None:
    config = feedback(api)
    deadly = killed_when(call, after)(config.judge, RetryPolicy(2), lambda _: None)
    with pytest.raises(Killed):
        collect(config, tmp_path, provider=deadly)
    told: list[str] = []
    seen: list[int] = []
    outcomes = collect(config, tmp_path, tell=told.append, progress=seen.append)
    assert labels(outcomes) == pytest.approx(expected(config))
    assert sum(seen) == 24
    assert len(api.batches) == 1
    assert set(api.executed.values()) == {1}
    assert told == ["1 batches of an earlier run found (24 requests)"]


def test_a_driver_killed_after_the_ledger_and_before_the_journal_doubles_nothing(
    api: FakeBatchAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = feedback(api)
    advance = BatchJournal.advance

    def dies_at_the_end(self, submission, state, **changes):  # type: ignore[no-untyped-def]
        if state == "done":
            raise Killed
        return advance(self, submission, state, **changes)

    monkeypatch.setattr(BatchJournal, "advance", dies_at_the_end)
    with pytest.raises(Killed):
        collect(config, tmp_path)
    monkeypatch.undo()
    os.environ["TEST_JUDGE_KEY"] = KEY
    try:
        outcomes = collect(config, tmp_path)
    finally:
        del os.environ["TEST_JUDGE_KEY"]
    assert labels(outcomes) == pytest.approx(expected(config))
    spent = sum(o.prompt_tokens + o.completion_tokens for o in outcomes)
    assert spent == api.tokens_billed
    assert len(api.batches) == 1


def test_a_create_whose_answer_was_lost_is_looked_for_before_it_is_repeated(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    api.swallow_create = True
    config = feedback(api)
    assert labels(collect(config, tmp_path)) == pytest.approx(expected(config))
    assert len(api.batches) == 1


def test_a_download_that_is_cut_off_is_loaded_anew_and_never_taken_for_whole(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    api.cut_downloads = 2
    config = feedback(api)
    assert labels(collect(config, tmp_path)) == pytest.approx(expected(config))
    assert len(api.batches) == 1  # no line was missed and asked again
    assert sum(name.endswith("/content") for name in api.requests) == 3


def test_a_download_that_never_ends_is_one_line_and_is_found_by_the_next_run(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    api.cut_downloads = 8
    config = feedback(api)
    with pytest.raises(FeedbackError, match=r"RemoteProtocolError.*run the same command again"):
        collect(config, tmp_path)
    assert labels(collect(config, tmp_path)) == pytest.approx(expected(config))
    assert len(api.batches) == 1


def test_batches_of_another_template_are_left_alone_and_told(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    config = feedback(api)
    deadly = killed_when("status", False)(config.judge, RetryPolicy(2), lambda _: None)
    with pytest.raises(Killed):
        collect(config, tmp_path, provider=deadly)
    told: list[str] = []
    other = feedback(api, {"system_prompt": "Be brief."})
    collect(other, tmp_path, tell=told.append)
    assert told == ["1 batches of another judge or template are left for a run with those"]


def test_the_key_stands_in_no_file_that_is_written(api: FakeBatchAPI, tmp_path: Path) -> None:
    config = feedback(api)
    deadly = killed_when("status", False)(config.judge, RetryPolicy(2), lambda _: None)
    with pytest.raises(Killed):
        collect(config, tmp_path, provider=deadly)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert all(KEY.encode() not in path.read_bytes() for path in files)


DRIVER = """
import pickle, sys
from pathlib import Path
from morlaif_ray.feedback.openai_batch import BatchCollector

config, plan, batches, path = pickle.loads(Path(sys.argv[1]).read_bytes())
with BatchCollector(config, plan, path, seed=0) as collector:
    collector.answer(batches)
"""


def test_a_driver_killed_by_the_system_finds_its_batch_again(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    api.polls_until_done = 10_000
    root = str(Path(__file__).parents[3])
    config = feedback(api)
    plan = plan_of(config)
    work = (
        config,
        plan,
        list(split_batches(make_pairs(4), plan, 12)),
        tmp_path / "feedback.sqlite",
    )
    (tmp_path / "work.pickle").write_bytes(pickle.dumps(work))
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "work.pickle")]
    environment = {**os.environ, "PYTHONPATH": root, "TEST_JUDGE_KEY": KEY}
    driver = subprocess.Popen(command, env=environment, cwd=root)
    try:
        deadline = time.monotonic() + 240
        while not any(name.startswith("GET batches/") for name in api.requests):
            assert time.monotonic() < deadline
            assert driver.poll() is None
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait(timeout=60)
    api.polls_until_done = 0
    assert labels(collect(config, tmp_path)) == pytest.approx(expected(config))
    assert len(api.batches) == 1
    assert set(api.executed.values()) == {1}
