"""Stage 2 with active selection, for real: ledger, Ray Tune trial, panel; on a model with random weights."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from jobs import collect_feedback
from jobs.context import JobContext, open_run
from jobs.plan import forecast_feedback
from jobs.progress import Reporter
from morlaif_ray.artifacts import StageFolder, read_records, read_table, write_records
from morlaif_ray.config import parse_config
from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.types import Judgement, ResponsePair

pytestmark = pytest.mark.jobs
WORDS = [
    "yes",
    "no",
    "maybe",
    "sorry",
    "because",
    "the",
    "sun",
    "is",
    "green",
    "and",
    "that",
    "helps",
    "you",
    "a",
    "lot",
]
SELECT = {"kind": "ensemble_disagreement", "num_pairs": 16, "rounds": 2, "ensemble_size": 2}


def make_pairs(num: int) -> list[ResponsePair]:
    return [
        ResponsePair(
            f"pair{i:03d}",
            f"prompt{i}",
            f"\n\nHuman: {WORDS[i % 15]} ?\n\nAssistant:",
            " " + " ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]),
            " " + " ".join(WORDS[i % 11 : i % 11 + 1 + i % 3]),
            "test" if i % 4 == 0 else "preference",
            float(i % 2),
        )
        for i in range(num)
    ]


def make_run(run_dir: Path) -> JobContext:
    config = parse_config(
        {
            "feedback": {"judge": {"kind": "rules", "measures": "lexical"}, "select": SELECT},
            "preference": {
                "topology": "shared_trunk",
                "panel_placement": "one_actor",
                "workers_per_trial": 0,
                "batch_size": 8,
                "learning_rate": 1e-3,
                "max_length": 32,
            },
        },
        "test",
    )
    context = open_run(config, run_dir, Reporter(quiet=True))
    _publish(run_dir, "0_sft", lambda folder: _save_model(folder / "model"))
    pairs = make_pairs(60)
    _publish(
        run_dir,
        "1_pairs",
        lambda folder: write_records(folder / "pairs.parquet", pairs, ResponsePair),
    )
    return context


def _publish(run_dir: Path, name: str, write) -> None:
    stage = StageFolder(run_dir.absolute(), name, config_part={}, inputs={}, seed=0)
    with stage.writing() as folder:
        write(folder)


def _save_model(folder: Path) -> None:
    from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer, save_pretrained

    texts = [p.prompt + p.response_a + p.response_b for p in make_pairs(60)]
    tokenizer = build_word_tokenizer(texts, vocabulary_size=100, max_length=32)
    model = ScratchModel(width=16, num_layers=1, num_heads=2, max_length=32)
    save_pretrained(build_scratch_model(model, tokenizer, 0), tokenizer, folder)


def num_answers(run_dir: Path) -> int:
    with sqlite3.connect(run_dir / "ledger" / "feedback.sqlite") as db:
        return int(db.execute("SELECT count(*) FROM answers").fetchone()[0])


@pytest.mark.timeout(2400)  # 51 s on two free cores; two Tune trials start slowly on busy ones
def test_the_judge_is_asked_about_the_chosen_pairs_once_and_the_run_repeats_bit_for_bit(
    ray_session: None, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    context = make_run(run_dir)
    collect_feedback.run(context)
    folder = run_dir / "2_feedback"
    chosen = read_table(folder / "selection.parquet")
    assert sorted(chosen["round"]) == [0] * 8 + [1] * 8
    judged = {entry.pair_id for entry in read_records(folder / "judgements.parquet", Judgement)}
    distinct = [pair for pair in make_pairs(60) if pair.response_a != pair.response_b]
    tests = {pair.pair_id for pair in distinct if pair.split == "test"}
    assert judged == set(chosen["pair_id"]) | tests
    assert num_answers(run_dir) == len(judged) * 13 * 2
    assert not (run_dir / "work" / "2_feedback").exists()

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)  # choices and answers are made anew: the same, and all of them recorded
    collect_feedback.run(context)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert num_answers(run_dir) == len(judged) * 13 * 2


def test_the_forecast_counts_the_chosen_pairs_only() -> None:
    everything = {"data": {"source": {"kind": "testbed", "num_prompts": 400}}}
    whole = parse_config(everything, "test")
    some = parse_config({**everything, "feedback": {"select": SELECT}}, "test")
    shares = whole.data.splits
    asked = shares.preference + shares.weights + shares.test
    num = forecast_feedback(whole).num_pairs
    available = round(num * shares.preference / asked)
    assert forecast_feedback(some).num_pairs == num - available + 16
