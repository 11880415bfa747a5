from __future__ import annotations

import csv
import json
import math
import shutil

import numpy as np
import pytest

from morlaif_ray.errors import ArtifactError
from morlaif_ray.evaluation.claims import all_gates, heldout_gain, weight_in_words
from morlaif_ray.evaluation.gates import verdict
from morlaif_ray.evaluation.report.policy import hacking_warnings, split_turns
from morlaif_ray.evaluation.run_tables import read_csv, read_run, readable
from morlaif_ray.types import Interval

NAN = math.nan


@pytest.fixture
def small(synthetic, tmp_path):
    """A run with two policies, cheap enough to change per test."""
    run_dir = tmp_path / "run"
    synthetic.write_synthetic_run(
        run_dir, arms=("linear", "single_pm"), num_prompts=40, num_steps=8
    )
    return run_dir


def read(run_dir):
    return read_run(run_dir, run_dir / "6_evaluation")


def rewrite(path, change):
    rows = read_csv(path)
    rows = [row for row in (change(row) for row in rows) if row is not None]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_whole_run_on_the_testbed_has_six_claims_that_hold(whole_run):
    found = all_gates(read(whole_run))
    assert [gate.holds for gate in found] == [True] * 6


def test_on_real_data_well_formedness_cannot_be_told(synthetic, tmp_path):
    run_dir = tmp_path / "real"
    synthetic.write_synthetic_run(run_dir, arms=("linear", "single_pm"), testbed=False, num_steps=5)
    found = {gate.claim.split(" ")[0]: verdict(gate) for gate in all_gates(read(run_dir))}
    assert found["Well-formedness"] == "cannot be told"
    assert list(found.values()).count("holds") == len(found) - 1


def test_an_empty_run_folder_gives_claims_that_cannot_be_told(tmp_path):
    tables = read_run(tmp_path, tmp_path / "6_evaluation")
    assert [verdict(gate) for gate in all_gates(tables)] == ["cannot be told"] * 6
    assert "config.yaml" in tables.missing
    assert "6_evaluation/win_rates.csv" in tables.missing


def test_claims_speak_of_linear_and_random_principle_even_where_others_do_better(whole_run):
    tables = read(whole_run)
    assert tables.primary_arm.name == "linear"
    assert tables.baseline_arm.summary["baseline"] == "random_principle"
    assert "(linear)" in all_gates(tables)[0].claim
    assert "(random principle)" in all_gates(tables)[0].claim


def test_the_held_out_gain_is_paired_and_in_sft_standard_deviations(small):
    tables = read(small)
    arm = tables.primary_arm
    policy, sft = tables.paired("reward_linear", "linear", "sft")
    found = heldout_gain(tables, arm)
    assert found.value == pytest.approx(np.mean(policy - sft) / 2.0)  # the fixture's sft_reward_std
    assert found.num == 40


def test_weights_that_the_config_gives_prove_no_sign(small):
    path = small / "4_reward" / "weights.json"
    weights = json.loads(path.read_text())
    path.write_text(json.dumps({**weights, "fitted": False}))
    assert verdict(all_gates(read(small))[1]) == "cannot be told"


def test_a_comparison_written_from_the_other_side_is_mirrored(small):
    path = small / "6_evaluation" / "win_rates.csv"
    before = read(small).win_row("linear", "sft")
    rewrite(
        path,
        lambda row: None if row["policy"] == "single_pm" or row["opponent"] == "single_pm" else row,
    )
    mirrored = read(small).win_row("sft", "linear")
    assert mirrored["win_rate"] == pytest.approx(1 - before["win_rate"])
    assert (mirrored["low"], mirrored["high"]) == pytest.approx(
        (1 - before["high"], 1 - before["low"])
    )
    assert (mirrored["wins"], mirrored["losses"]) == (before["losses"], before["wins"])


def test_a_policy_that_hacks_its_reward_is_named_with_every_sign(whole_run):
    warnings = hacking_warnings(read(whole_run))
    assert [text.split(":")[0] for text in warnings] == [
        "Policy worst case",
        "Policy lower quantile",
    ]
    assert warnings[0] == (
        "Policy worst case: its reward rises by 2.10 SFT standard deviations, but its true utility falls by 0.20, "
        "well-formed responses fall from 97% to 71%, responses grow to 1.7 times the length, "
        "the KL of 9.8 nats is beyond its target of 6."
    )


@pytest.mark.parametrize(
    ("principle", "weight", "words"),
    [
        ("helpfulness", Interval(0.6, 0.5, 0.7, 9), "rewards helpfulness"),
        ("detail", Interval(-0.2, -0.3, -0.1, 9), "penalises detail"),
        (
            "sycophancy",
            Interval(-0.4, -0.5, -0.3, 9),
            "penalises anti-sycophancy, so rewards sycophancy",
        ),
        ("toxicity", Interval(0.4, 0.3, 0.5, 9), "rewards absence of toxicity"),
        ("detail", Interval(0.1, -0.1, 0.3, 9), "cannot be told from 0"),
        ("detail", Interval(0.0, NAN, NAN, 9), "ignores detail"),
        ("detail", Interval(NAN, NAN, NAN, 0), "-"),
    ],
)
def test_a_weight_is_put_in_words(principle, weight, words):
    assert weight_in_words(principle, weight) == words


def test_names_are_spelled_for_readers():
    assert readable("baseline_mean_log_odds") == "mean log-odds"
    assert readable("uncertainty_weighted") == "uncertainty weighted"


def test_a_dialogue_is_split_into_turns_without_the_open_last_one():
    prompt = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: who?\n\nAssistant:"
    assert split_turns(prompt) == (("Human", "hello"), ("Assistant", "hi"), ("Human", "who?"))
    assert split_turns("no turns") == (("Text", "no turns"),)


def test_an_empty_cell_and_nan_are_missing_and_a_name_that_looks_like_a_number_stays_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("policy,a,b\n007,,nan\n")
    (row,) = read_csv(path)
    assert row["policy"] == "007"
    assert math.isnan(row["a"])
    assert math.isnan(row["b"])


def test_a_damaged_table_is_an_error_that_names_the_file(small):
    path = small / "4_reward" / "scalarizers.csv"
    path.write_text("name,accuracy\nlinear,very good\n")
    with pytest.raises(ArtifactError, match=r"scalarizers\.csv: not a readable table"):
        read(small)


def test_a_run_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="no such run folder"):
        read_run(tmp_path / "absent", tmp_path)


def test_an_arm_of_the_config_that_was_not_trained_is_listed_as_missing(small):
    shutil.rmtree(small / "5_policy" / "single_pm")
    tables = read(small)
    assert [arm.name for arm in tables.arms] == ["linear"]
    assert tables.missing == ("5_policy/single_pm/summary.json",)
