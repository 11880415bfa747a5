"""The pool on a real local Ray: killed actors cost nothing but time, errors arrive as one line, runs resume."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from pathlib import Path

import psutil
import pytest

from actors.feedback_pool import FeedbackPool
from actors.ledger_writer import LedgerRecipe
from jobs import collect_feedback
from jobs.context import JobContext, open_run
from jobs.progress import Reporter
from morlaif_ray.artifacts import StageFolder, read_json, read_records, read_table, write_records
from morlaif_ray.config import parse_config
from morlaif_ray.config.judging import FeedbackConfig
from morlaif_ray.errors import ActorLostError, DataError, FeedbackError, ResourceError
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan, split_batches
from morlaif_ray.types import Judgement, ResponsePair
from tests.fake_openai.server import KEY, FakeOpenAI
from tests.processes import WAIT_S, kill, once, pid_of, wait_until_gone
from tests.unit.feedback.fakes import PLAN, make_pairs

pytestmark = pytest.mark.actors
KEY_ENV = "MORLAIF_TEST_JUDGE_KEY"
RECIPE = LedgerRecipe(PLAN.recipe, "{}", "template")


@pytest.fixture(scope="module", autouse=True)
def _key() -> None:
    """Before Ray starts, whose workers inherit it; `tests/conftest.py` restores what was there."""
    os.environ[KEY_ENV] = KEY


def api(server: FakeOpenAI, **changes: object) -> FeedbackConfig:
    judge = {"kind": "openai", "model": "fake", "base_url": server.url, "api_key_env": KEY_ENV}
    judge["request_timeout_s"] = WAIT_S  # no request is sent twice because this machine is slow
    values = {"judge": judge, "max_in_flight": 4, "num_workers": 2}
    return FeedbackConfig.model_validate(values | changes)


def pool_of(feedback: FeedbackConfig, path: Path, **changes: float) -> FeedbackPool:
    return FeedbackPool(feedback, PLAN, path, RECIPE, seed=0, start_timeout_s=WAIT_S, **changes)  # type: ignore[arg-type]


def batches(count: int, plan: QuestionPlan = PLAN) -> list[PairBatch]:
    return list(split_batches(make_pairs(count), plan, questions_per_batch=40))


def recorded(path: Path) -> int:
    """Rows in the ledger, read beside its writer."""
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        try:
            return int(db.execute("SELECT count(*) FROM answers").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def is_waiting(path: Path, server: FakeOpenAI, num_workers: int) -> bool:
    """All that the server answered is recorded, and every worker waits for the four requests that it has in flight."""
    held = server.hold_after
    assert held is not None
    return len(server.bodies) >= held + 4 * num_workers and recorded(path) == held


def check_answers(outcomes: list, count: int) -> None:  # type: ignore[type-arg]
    """response_a has i + 1 words, response_b two; the server's taste is 0.5 nats a word, its bias 0.7."""
    found = [value for outcome in outcomes for value in outcome.log_odds_N.tolist()]
    expected = [sign * 0.5 * (i - 1) + 0.7 for i in range(count) for sign in (1, 1, -1, -1)]
    assert found == pytest.approx(expected)


def test_a_killed_worker_loses_no_answer_and_asks_only_what_it_had_in_flight_again(
    ray_session: None, tmp_path: Path
) -> None:
    path = tmp_path / "l.sqlite"
    with FakeOpenAI(hold_after=80) as server, pool_of(api(server), path) as pool:
        killer = once(
            lambda: is_waiting(path, server, 2), lambda: (kill(pool.workers[0]), server.release())
        )
        advanced: list[int] = []
        outcomes = pool.answer(batches(60), advanced.append)
        killer.join(WAIT_S)
        check_answers(outcomes, 60)
        assert recorded(path) == sum(advanced) == 240
        assert len(server.bodies) == 240 + 4


def test_a_killed_ledger_loses_no_answer_and_nothing_is_asked_again(
    ray_session: None, tmp_path: Path
) -> None:
    path = tmp_path / "l.sqlite"
    # It dies while answers come, and some of them only come when it is dead.
    with FakeOpenAI(delay_s=0.02, hold_after=200) as server, pool_of(api(server), path) as pool:
        killer = once(lambda: recorded(path) >= 40, lambda: (kill(pool._ledger), server.release()))
        outcomes = pool.answer(batches(60))
        killer.join(WAIT_S)
        check_answers(outcomes, 60)
        assert recorded(path) == len(server.bodies) == 240


def test_a_worker_that_dies_beyond_its_budget_ends_the_run_and_the_next_run_resumes(
    ray_session: None, tmp_path: Path
) -> None:
    path = tmp_path / "l.sqlite"
    with FakeOpenAI(hold_after=40) as server:
        feedback = api(server, num_workers=1)
        with pool_of(feedback, path, max_restarts=0) as pool:
            once(lambda: is_waiting(path, server, 1), lambda: kill(pool.workers[0]))
            with pytest.raises(
                ActorLostError, match=r"died more often than its 0 restarts allow.*nothing recorded"
            ):
                pool.answer(batches(40))
        assert recorded(path) == 40
        server.release()
        with pool_of(feedback, path) as pool:
            assert pool.num_recorded_before == 40
            check_answers(pool.answer(batches(40)), 40)
        assert len(server.bodies) == 40 + 4 + 120


def test_a_worker_that_hangs_is_killed_and_its_batch_is_done_by_its_successor(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    path = tmp_path / "l.sqlite"
    killed: list[object] = []
    kill_actor = ray.kill
    with (
        FakeOpenAI(hold_after=40) as server,
        pool_of(api(server, num_workers=1), path) as pool,
    ):
        pool.wait_until_started()
        victim = pid_of(pool.workers[0])

        def freeze() -> None:
            psutil.Process(victim).suspend()
            pool.stall_timeout_s = 1.0  # only now: however slow a worker is, it is not silent
            server.release()

        def note_and_kill(actor: object, **options: bool) -> None:
            killed.append(actor)
            pool.stall_timeout_s = WAIT_S  # its successor has all the time that it needs to start
            kill_actor(actor, **options)

        with monkeypatch.context() as patch:
            patch.setattr(ray, "kill", note_and_kill)
            freezer = once(lambda: is_waiting(path, server, 1), freeze)
            check_answers(pool.answer(batches(40)), 40)
        freezer.join(WAIT_S)
        assert killed == [pool.workers[0]]
        wait_until_gone(victim)
        assert recorded(path) == 160
        assert len(server.bodies) == 160 + 4


def test_failed_questions_are_asked_again_in_an_extra_round(
    ray_session: None, tmp_path: Path
) -> None:
    with FakeOpenAI() as server:
        server.faults.extend(["400"] * 3)
        feedback = api(server, num_workers=1, retry_failed=1)
        with pool_of(feedback, tmp_path / "l.sqlite") as pool:
            check_answers(pool.answer(batches(5)), 5)
        assert server.num_answered == 20


def test_limits_are_kept_by_one_limiter_for_all_workers(ray_session: None, tmp_path: Path) -> None:
    with FakeOpenAI() as server:
        feedback = api(server, requests_per_minute=1200.0)  # 20 a second
        with pool_of(feedback, tmp_path / "l.sqlite") as pool:
            started_s = time.monotonic()
            check_answers(pool.answer(batches(15)), 15)
            assert (
                time.monotonic() - started_s > 60 / 20 - 1.0 - 0.2
            )  # one second's burst is allowed


def test_a_second_run_on_the_same_ledger_hears_one_line(ray_session: None, tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with (
        FakeOpenAI() as server,
        pool_of(api(server, num_workers=1), path),
        pytest.raises(FeedbackError, match="in use by another run"),
        pool_of(api(server, num_workers=1), path, lock_wait_s=0.5),
    ):
        pass


def test_a_ledger_too_slow_to_say_what_it_holds_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    class Slow:
        recorded = property(lambda self: self)

        def remote(self, keys: list[bytes]) -> object:
            return object()

    def late(refs: object, timeout: float) -> None:
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr(ray, "get", late)
    pool = pool_of(FeedbackConfig(), tmp_path / "l.sqlite", call_timeout_s=7.0)
    pool._ledger, pool.num_recorded_before = Slow(), 1
    with pytest.raises(ResourceError, match="ledger did not say within 7 s what it holds"):
        pool.unfinished_first(batches(2))


def test_a_missing_key_reaches_the_driver_as_one_line(ray_session: None, tmp_path: Path) -> None:
    with FakeOpenAI() as server:
        judge = {
            "kind": "openai",
            "model": "m",
            "base_url": server.url,
            "api_key_env": "NO_SUCH_KEY_HERE",
        }
        with (
            pytest.raises(
                FeedbackError, match=r"^environment variable NO_SUCH_KEY_HERE is not set"
            ),
            pool_of(api(server, num_workers=1, judge=judge), tmp_path / "l.sqlite") as pool,
        ):
            pool.answer(batches(4))
        assert server.bodies == []


def run_of(run_dir: Path, pairs: list[ResponsePair], **feedback: object) -> JobContext:
    config = parse_config(
        {"feedback": {"judge": {"kind": "rules", "measures": "lexical"}} | feedback}, "test"
    )
    context = open_run(config, run_dir, Reporter(quiet=True))
    stage = StageFolder(run_dir.absolute(), "1_pairs", config_part={}, inputs={}, seed=0)
    with stage.writing() as folder:
        write_records(folder / "pairs.parquet", pairs, ResponsePair)
    return context


def test_the_job_writes_its_stage_and_the_same_command_skips_it(
    ray_session: None, tmp_path: Path
) -> None:
    context = run_of(tmp_path / "run", make_pairs(30))
    collect_feedback.run(context)
    folder = tmp_path / "run" / "2_feedback"
    judgements = read_records(folder / "judgements.parquet", Judgement)
    pairs = [pair for pair in make_pairs(30) if pair.response_a != pair.response_b]
    assert len(judgements) == len(pairs) * (12 + 1 + 1)
    summary = read_json(folder / "summary.json")
    assert summary["num_questions"] == len(pairs) * 13 * 2
    assert summary["judge"] == "rules/lexical-1"
    assert summary["by_principle"]["detail"]["mean_position_bias"] == pytest.approx(0.4, abs=1e-6)
    names = {path.name for path in folder.iterdir()}
    answers = read_table(tmp_path / "run" / "ledger" / "answers.parquet")
    assert answers["pair_id"].count(pairs[0].pair_id) == 13 * 2
    assert names == {
        "judgements.parquet",
        "random_assignment.parquet",
        "summary.json",
        "agreement.csv",
        "correlation.csv",
        "matrix_intervals.csv",
        "position_bias.csv",
        "calibration.csv",
        "manifest.json",
    }
    before = (folder / "manifest.json").stat().st_mtime_ns
    collect_feedback.run(context)
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_same_seed_and_pairs_give_the_same_bytes_however_often_the_run_was_interrupted(
    ray_session: None, tmp_path: Path
) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        collect_feedback.run(run_of(tmp_path / name, make_pairs(20), num_workers=workers))
    shutil.rmtree(
        tmp_path / "two" / "2_feedback"
    )  # as if it had died before publishing: the ledger has it all
    collect_feedback.run(run_of(tmp_path / "two", make_pairs(20), num_workers=2))
    for file in ("judgements.parquet", "summary.json", "agreement.csv", "correlation.csv"):
        left, right = (tmp_path / name / "2_feedback" / file for name in ("one", "two"))
        assert left.read_bytes() == right.read_bytes()


def test_too_many_missing_answers_end_the_stage_with_the_reason(
    ray_session: None, tmp_path: Path
) -> None:
    judge = {"kind": "rules", "measures": "lexical", "fault_share": 0.5}
    with pytest.raises(
        FeedbackError, match=r"judgements are missing .* neither A nor B among the top tokens"
    ):
        collect_feedback.run(run_of(tmp_path / "run", make_pairs(20), judge=judge))
    assert not (tmp_path / "run" / "2_feedback").exists()


def test_pairs_of_identical_responses_only_are_a_data_error(tmp_path: Path) -> None:
    pairs = [pair for pair in make_pairs(5) if pair.response_a.strip() == "word"]
    same = [ResponsePair(p.pair_id, p.prompt_id, p.prompt, " x", " x", "test", 1.0) for p in pairs]
    with pytest.raises(DataError, match="both responses are identical"):
        collect_feedback.run(run_of(tmp_path / "run", same))
