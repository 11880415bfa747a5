"""The Batch API judge against a fake provider: every question answered, paid once, whatever dies in between."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.batch_journal import BatchJournal
from morlaif_ray.feedback.batch_provider import OpenAIBatchProvider
from morlaif_ray.feedback.judges import recipe_for
from morlaif_ray.feedback.ledger import Ledger
from morlaif_ray.feedback.openai_batch import BatchCollector
from morlaif_ray.feedback.permits import BudgetReachedError
from morlaif_ray.feedback.questions import QuestionPlan, split_batches
from morlaif_ray.feedback.recording import BatchOutcome
from morlaif_ray.feedback.retry import RetryPolicy
from tests.fake_openai.batches import FakeBatchAPI
from tests.fake_openai.server import KEY
from tests.unit.feedback.fakes import make_pairs, words_difference

pytestmark = pytest.mark.unit
NAMES = (("detail", "More detail?"), ("kind", "Kinder?"), ("general", "Better?"))
PRICES = "as_of: 2026-11-01\nmodels:\n  m: {prompt: 1000.0, completion: 0.0}\n"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBatchAPI]:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with FakeBatchAPI() as fake:
        yield fake


def feedback(api: FakeBatchAPI, judge: dict[str, object] | None = None, **rest: object):  # type: ignore[no-untyped-def]
    values = {
        "kind": "openai_batch",
        "model": "m",
        "base_url": api.url,
        "api_key_env": "TEST_JUDGE_KEY",
        "poll_s": 0.01,
    }
    return FeedbackConfig.model_validate({"judge": values | (judge or {}), **rest})


def plan_of(config: FeedbackConfig, names: tuple[tuple[str, str], ...] = NAMES) -> QuestionPlan:
    return QuestionPlan(names, "both", 0, recipe_for(config, 0), config.joint)


def collect(
    config: FeedbackConfig,
    folder: Path,
    pairs: int = 4,
    *,
    sleep: Callable[[float], None] = lambda _: None,
    provider: OpenAIBatchProvider | None = None,
    progress: Callable[[int], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[BatchOutcome]:
    plan = plan_of(config)
    batches = list(split_batches(make_pairs(pairs), plan, 12))
    with BatchCollector(
        config,
        plan,
        folder / "feedback.sqlite",
        seed=0,
        sleep=sleep,
        provider=provider,
        tell=tell,
        lock_wait_s=0.2,
    ) as collector:
        return collector.answer(batches, progress)


def expected(config: FeedbackConfig, pairs: int = 4) -> list[float]:
    plan = plan_of(config)
    questions = [q for pair in make_pairs(pairs) for q in plan.questions(pair)]
    return [0.5 * words_difference(question) + 0.7 for question in questions]


def labels(outcomes: list[BatchOutcome]) -> list[float]:
    return [value for outcome in outcomes for value in outcome.log_odds_N.tolist()]


def test_all_questions_go_through_files_and_come_back_with_the_right_labels(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    seen: list[int] = []
    config = feedback(api)
    outcomes = collect(config, tmp_path, progress=seen.append)
    assert labels(outcomes) == pytest.approx(expected(config))
    assert sum(seen) == sum(len(outcome.log_odds_N) for outcome in outcomes) == 24
    assert len(api.batches) == 1
    assert set(api.executed.values()) == {1}
    spent = sum(o.prompt_tokens + o.completion_tokens for o in outcomes)
    assert spent == api.tokens_billed


def test_files_are_split_at_both_limits(api: FakeBatchAPI, tmp_path: Path) -> None:
    config = feedback(api, {"max_requests_per_file": 5})
    collect(config, tmp_path)
    assert sorted(len(f.splitlines()) for f in inputs(api)) == [4, 5, 5, 5, 5]
    with FakeBatchAPI() as other:
        small = feedback(other, {"max_file_mb": 0.002})
        collect(small, tmp_path / "other")
        assert all(len(file) <= 2000 for file in inputs(other))
        assert len(other.executed) == 24


def inputs(api: FakeBatchAPI) -> list[bytes]:
    return [api.files[batch["input_file_id"]] for batch in api.batches.values()]


def test_answers_are_found_again_and_nothing_is_submitted_twice(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    config = feedback(api)
    first = collect(config, tmp_path, pairs=3)
    second = collect(config, tmp_path, pairs=4)
    assert len(api.batches) == 2
    assert set(api.executed.values()) == {1}
    assert labels(second)[:18] == labels(first)
    assert [outcome.num_recorded for outcome in second] == [12, 6]


@pytest.mark.parametrize("fault", ["500", "429", "missing", "garbled"])
def test_failed_lines_are_asked_again_in_a_next_batch(
    api: FakeBatchAPI, tmp_path: Path, fault: str
) -> None:
    api.line_faults[fault] = 3
    config = feedback(api)
    outcomes = collect(config, tmp_path)
    assert labels(outcomes) == pytest.approx(expected(config))
    assert [len(file.splitlines()) for file in inputs(api)] == [24, 3]
    assert set(api.executed.values()) == {1}


def test_lines_that_fail_for_good_end_as_failed_with_their_reason(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    api.line_faults["500"] = 100
    outcomes = collect(feedback(api, max_attempts=2), tmp_path)
    assert [outcome.num_failed for outcome in outcomes] == [12, 12]
    assert outcomes[0].reasons[0].endswith("told to fail (after 2 attempts)")
    assert len(api.batches) == 2


def test_a_line_that_is_refused_is_not_asked_again(api: FakeBatchAPI, tmp_path: Path) -> None:
    api.line_faults["400"] = 1
    outcomes = collect(feedback(api), tmp_path)
    assert sum(outcome.num_failed for outcome in outcomes) == 1
    assert len(api.batches) == 1


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_an_ended_batch_did_not_reach_goes_into_the_next(
    api: FakeBatchAPI, tmp_path: Path, status: str
) -> None:
    api.final_status.append(status)
    config = feedback(api)
    assert labels(collect(config, tmp_path)) == pytest.approx(expected(config))
    assert [len(file.splitlines()) for file in inputs(api)] == [24, 12]
    assert set(api.executed.values()) == {1}


def test_a_full_queue_at_the_provider_is_waited_for(api: FakeBatchAPI, tmp_path: Path) -> None:
    api.max_enqueued, api.polls_until_done = 1, 2
    config = feedback(api, {"max_requests_per_file": 8})
    assert labels(collect(config, tmp_path)) == pytest.approx(expected(config))
    assert set(api.executed.values()) == {1}


def test_a_refused_batch_ends_the_stage_in_one_line_and_leaves_nothing_under_way(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    api.refuse_with.append(("model_not_found", "The provided model 'm' is not supported"))
    config = feedback(api)
    with pytest.raises(FeedbackError, match="refused a batch of 24 requests: The provided model"):
        collect(config, tmp_path)
    assert BatchJournal(tmp_path / "feedback.sqlite").unfinished(recipe_for(config, 0)) == []


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


def test_a_provider_that_stumbles_is_asked_again(api: FakeBatchAPI, tmp_path: Path) -> None:
    api.http_faults.extend([500, 0, 503, 0, 429, 0, 500])
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


def test_a_wrong_key_is_one_line_after_one_request(
    api: FakeBatchAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "sk-wrong-and-secret")
    with pytest.raises(FeedbackError, match=r"refused the key in TEST_JUDGE_KEY \(HTTP 401\)") as e:
        collect(feedback(api), tmp_path)
    assert "sk-wrong" not in str(e.value)
    assert len(api.requests) == 1


def test_a_provider_without_a_batch_api_is_told_from_a_lost_batch(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    api.http_faults.append(404)
    with pytest.raises(FeedbackError, match=r"no Batch API \(HTTP 404\)"):
        collect(feedback(api), tmp_path)


def test_a_joint_request_travels_as_one_line(api: FakeBatchAPI, tmp_path: Path) -> None:
    config = feedback(api, joint=2)
    outcomes = collect(config, tmp_path)
    assert len(api.executed) == 4 * 2 * 2  # pairs x orders x (one group, "general")
    assert sum(outcome.num_failed for outcome in outcomes) == 0
    spent = sum(o.prompt_tokens + o.completion_tokens for o in outcomes)
    assert spent == api.tokens_billed


def test_the_batch_price_is_counted_and_the_budget_is_never_overspent(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text(PRICES)
    # 1000 dollars a million tokens at half price: 0.0005 dollars a token; a request is estimated above 200 tokens.
    config = feedback(api, budget_usd=0.3, prices_file=str(prices))
    with pytest.raises(BudgetReachedError, match="budget_usd is reached"):
        collect(config, tmp_path)
    ledger = Ledger(tmp_path / "feedback.sqlite")
    spent, answers = ledger.spent_usd, ledger.num_answers()
    ledger.close()
    assert 0 < answers < 24
    assert 0.0 < spent <= 0.3
    prompt_tokens = sum(
        len(json.loads(line)["body"]["messages"][0]["content"].split())
        for file in inputs(api)
        for line in file.splitlines()
    )
    assert spent == pytest.approx(prompt_tokens * 0.0005)
    richer = feedback(api, budget_usd=50.0, prices_file=str(prices))
    assert labels(collect(richer, tmp_path)) == pytest.approx(expected(richer))
    assert set(api.executed.values()) == {1}


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
        deadline = time.monotonic() + 60
        while not any(name.startswith("GET batches/") for name in api.requests):
            assert time.monotonic() < deadline
            assert driver.poll() is None
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait(timeout=10)
    api.polls_until_done = 0
    assert labels(collect(config, tmp_path)) == pytest.approx(expected(config))
    assert len(api.batches) == 1
    assert set(api.executed.values()) == {1}


def test_files_stay_at_the_provider_unless_the_config_says_otherwise(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    collect(feedback(api), tmp_path)
    assert api.deleted == {}
    api.line_faults = {"500": 3}
    config = feedback(api, {"delete_files": True, "max_requests_per_file": 20})
    outcomes = collect(config, tmp_path, pairs=10)
    assert labels(outcomes) == pytest.approx(expected(config, pairs=10))
    assert len(api.batches) == 1 + 3  # 36 new questions in two files, three lines once more
    # Input and output of all three, and the error file of the first.
    assert len(api.deleted) == 3 + 3 + 1
    assert len(api.files) == 2  # of the first run
    assert not list(tmp_path.glob("*.batches/*.fetched"))


def test_a_file_that_cannot_be_deleted_is_named_and_ends_nothing(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    told: list[str] = []
    config = feedback(api, {"delete_files": True})

    class Keeping(OpenAIBatchProvider):
        def delete(self, file_id: str) -> None:
            raise FeedbackError("no right to delete")

    provider = Keeping(config.judge, RetryPolicy(max_attempts=2))
    collect(config, tmp_path, provider=provider, tell=told.append)
    assert [line for line in told if "stays" in line] == [
        "file file-0 stays at the provider: no right to delete",
        "file file-1 stays at the provider: no right to delete",
    ]


def test_a_batch_is_read_line_by_line_and_takes_less_memory_than_its_files(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    import tracemalloc

    config = feedback(api)
    peaks: list[int] = []

    class Measuring(OpenAIBatchProvider):
        def fetch(self, file_id: str, path: Path) -> None:
            super().fetch(file_id, path)
            # As if the judge had reasoned at length: 420 lines become 21 MB.
            lines = path.read_bytes().splitlines()
            path.write_bytes(
                b"".join(line[:-1] + b', "pad": "' + b"x" * 50_000 + b'"}\n' for line in lines)
            )
            del lines
            tracemalloc.start()

        def close(self) -> None:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            super().close()

    provider = Measuring(config.judge, RetryPolicy(max_attempts=2))
    outcomes = collect(config, tmp_path, pairs=70, provider=provider)
    assert sum(outcome.num_failed for outcome in outcomes) == 0
    files = 420 * (50_000 + 300)
    assert peaks[0] < files / 4, (peaks, files)
