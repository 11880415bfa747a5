"""The Batch API judge against a fake provider: every question answered and paid once, whatever a line or file meets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.batch_journal import BatchJournal
from morlaif_ray.feedback.batch_provider import OpenAIBatchProvider
from morlaif_ray.feedback.judges import recipe_for
from morlaif_ray.feedback.ledger import Ledger
from morlaif_ray.feedback.permits import BudgetReachedError
from morlaif_ray.feedback.retry import RetryPolicy
from tests.fake_openai.batches import FakeBatchAPI
from tests.unit.feedback.batch_runs import collect, expected, feedback, inputs, labels

pytestmark = pytest.mark.unit
PRICES = "as_of: 2026-11-01\nmodels:\n  m: {prompt: 1000.0, completion: 0.0}\n"


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


def test_a_provider_that_stumbles_is_asked_again(api: FakeBatchAPI, tmp_path: Path) -> None:
    api.http_faults.extend([500, 0, 503, 0, 429, 0, 500])
    config = feedback(api)
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
