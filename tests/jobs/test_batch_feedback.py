"""Stage 2 through the Batch API, end to end: same labels and ledger as the live judge, without Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import ask_judge, checks, collect_feedback
from jobs.context import JobContext, open_run
from jobs.feedback_status import status_lines
from jobs.progress import Reporter
from morlaif_ray.artifacts import StageFolder, read_json, read_records, write_records
from morlaif_ray.config import parse_config
from morlaif_ray.errors import ConfigError, FeedbackError
from morlaif_ray.feedback.parsing import HARD_LOG_ODDS
from morlaif_ray.types import Judgement, ResponsePair
from tests.fake_openai.batches import FakeBatchAPI
from tests.fake_openai.server import KEY

pytestmark = pytest.mark.jobs
KEY_ENV = "MORLAIF_TEST_BATCH_KEY"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBatchAPI]:
    monkeypatch.setenv(KEY_ENV, KEY)
    with FakeBatchAPI() as fake:
        yield fake


def pairs(count: int) -> list[ResponsePair]:
    """Pair i: response_a has i + 1 words, response_b two and a half."""
    return [
        ResponsePair(
            f"pair{i}",
            f"prompt{i}",
            f"\n\nHuman: question {i}\n\nAssistant:",
            " word" * (i + 1),
            " two words." + ("" if i != 1 else " x"),
            "test",
            float(i + 1 > 2),
        )
        for i in range(count)
    ]


def run_of(
    run_dir: Path,
    api: FakeBatchAPI,
    judge: dict[str, object] | None = None,
    found: list[ResponsePair] | None = None,
    **feedback: object,
) -> JobContext:
    values = {
        "kind": "openai_batch",
        "model": "m",
        "base_url": api.url,
        "api_key_env": KEY_ENV,
        "poll_s": 0.01,
    }
    config = parse_config({"feedback": {"judge": values | (judge or {}), **feedback}}, "test")
    context = open_run(config, run_dir, Reporter(quiet=True))
    stage = StageFolder(run_dir.absolute(), "1_pairs", config_part={}, inputs={}, seed=0)
    with stage.writing() as folder:
        write_records(folder / "pairs.parquet", found or pairs(12), ResponsePair)
    return context


def stage_of(run_dir: Path) -> tuple[dict[str, Judgement], dict]:  # type: ignore[type-arg]
    folder = run_dir / "2_feedback"
    judgements = read_records(folder / "judgements.parquet", Judgement)
    return {f"{j.pair_id} {j.principle}": j for j in judgements}, read_json(folder / "summary.json")


def test_the_stage_is_written_with_debiased_labels_and_every_request_paid_once(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    collect_feedback.run(run_of(tmp_path / "run", api))
    judgements, summary = stage_of(tmp_path / "run")
    # The server's taste is 0.5 nats a word and its bias 0.7 nats, which both orders take out.
    assert judgements["pair5 detail"].log_odds == pytest.approx(0.5 * (6 - 2))
    assert judgements["pair0 sycophancy"].log_odds == pytest.approx(0.5 * (1 - 2))
    assert judgements["pair5 detail"].position_bias == pytest.approx(0.7)
    assert summary["num_questions"] == len(api.executed) == 12 * 13 * 2
    assert set(api.executed.values()) == {1}
    assert summary["tokens"] == api.tokens_billed
    assert summary["num_truncated"] == 0
    assert "joint_agreement" not in summary


def test_a_joint_run_reports_its_agreement_with_separate_questions(
    api: FakeBatchAPI, tmp_path: Path
) -> None:
    collect_feedback.run(run_of(tmp_path / "run", api, joint=12, joint_check_share=0.5))
    judgements, summary = stage_of(tmp_path / "run")
    # A hard label in both orders: the letters contradict each other where the bias of 0.7 wins.
    assert judgements["pair9 detail"].log_odds == pytest.approx(HARD_LOG_ODDS)
    assert judgements["pair2 detail"].status == "tie"
    found = summary["joint_agreement"]
    assert found["num_pairs"] == 6
    assert found["num_compared"] + found["num_ties"] == 6 * 12
    assert found["agreement"] == 1.0
    # 12 pairs x 2 orders x (one joint request and "general"); 6 pairs x 2 orders x 12 separate ("general" is known).
    assert sum(api.executed.values()) == 12 * 2 * 2 + 6 * 2 * 12
    assert summary["tokens"] == api.tokens_billed


def test_truncated_pairs_are_counted_in_the_summary(api: FakeBatchAPI, tmp_path: Path) -> None:
    found = pairs(12)
    long = ResponsePair("long", "p", found[0].prompt, " w" * 5000, " v" * 3000, "test", 1.0)
    context = run_of(tmp_path / "run", api, found=[*found, long], max_prompt_tokens=1000)
    collect_feedback.run(context)
    judgements, summary = stage_of(tmp_path / "run")
    assert summary["num_truncated"] == 1
    assert judgements["long detail"].status == "tie"  # cut to one length, the words are as many


def test_the_status_verb_tells_what_is_at_the_provider(
    api: FakeBatchAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.polls_until_done = 2
    told: list[str] = []
    write = ask_judge._Note.write

    def look(note: ask_judge._Note, *, running: bool = True) -> None:
        write(note, running=running)
        told.extend(status_lines(tmp_path / "run"))

    monkeypatch.setattr(ask_judge._Note, "write", look)
    collect_feedback.run(run_of(tmp_path / "run", api, found=pairs(2)))
    assert "running: 0 of 52 questions done (0.0%), 52 left, 0 failed" in told
    waiting = [line for line in told if line.startswith("at the provider")]
    assert waiting[0].startswith("at the provider: 1 batches, 52 requests, the oldest for ")
    assert "ended: 52 of 52 questions done (100.0%), 0 left, 0 failed" in told


def test_nothing_loads_ray(api: FakeBatchAPI, tmp_path: Path) -> None:
    before = "ray" in sys.modules
    collect_feedback.run(run_of(tmp_path / "run", api, found=pairs(2)))
    assert ("ray" in sys.modules) == before


def test_a_wrong_key_ends_the_stage_in_one_line_after_one_request(
    api: FakeBatchAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "sk-wrong-and-secret")
    with pytest.raises(FeedbackError) as caught:
        collect_feedback.run(run_of(tmp_path / "run", api))
    assert str(caught.value).count("\n") == 0
    assert "sk-wrong" not in str(caught.value)
    assert len(api.requests) == 1


@pytest.mark.parametrize(
    ("feedback", "message"),
    [
        ({"template": "{response_a} {response_b} {question}"}, r"lacks \{conversation\}"),
        ({"template": "{conversation} {response_a} {response_b} {question} {x}"}, r"\{x\}"),
        ({"few_shot": "no/such/file.yaml"}, r"feedback\.few_shot: no/such/file\.yaml"),
        ({"tokenizer": "no/such/tokenizer.json"}, r"feedback\.tokenizer: no/such"),
        ({"max_prompt_tokens": 20}, r"max_prompt_tokens is 20"),
    ],
)
def test_a_wrong_prompt_is_refused_before_anything_starts(
    api: FakeBatchAPI, tmp_path: Path, feedback: dict[str, object], message: str
) -> None:
    context = run_of(tmp_path / "run", api, **feedback)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message) as caught:
        checks.check_before_start(context)
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match=message):
        collect_feedback.run(context)
    assert api.requests == []


def test_a_missing_key_is_told_before_anything_starts(
    api: FakeBatchAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_ENV)
    with pytest.raises(FeedbackError, match=rf"environment variable {KEY_ENV} is not set"):
        checks.check_before_start(run_of(tmp_path / "run", api))
    assert api.requests == []
