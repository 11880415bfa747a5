"""Stage `4_reward` and the offline draws on synthetic pairs."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest

from morlaif_ray.config.learning import ALL_SCALARIZERS, RewardConfig
from morlaif_ray.errors import ArtifactError, ConfigError, DataError
from morlaif_ray.reward import (
    RewardFunction,
    choose_best,
    evaluate_draws,
    fit_reward,
    make_draws,
    write_reward,
)
from morlaif_ray.reward.pairs import collect_odds, read_pair_scores
from morlaif_ray.types import Judgement

CONFIG = RewardConfig(num_bootstrap=50)


@pytest.fixture
def made(pairs, inputs):
    return inputs(pairs(600, seed=1), pairs(1500, seed=2, prefix="t"))


def test_the_fit_reports_every_column_with_intervals(made):
    bayes = dict.fromkeys(made.test.pair_ids, 0.8)
    fit = fit_reward(made, CONFIG, seed=0, bayes_accuracy=bayes)
    by_name = {row["name"]: row for row in fit.scalarizers}
    assert list(by_name) == [
        *ALL_SCALARIZERS,
        "random_principle",
        "human_labels",
        "bayes",
        "ceiling",
    ]
    for row in fit.scalarizers:
        assert row["low"] - 1e-9 <= row["accuracy"] <= row["high"] + 1e-9
    assert by_name["linear"]["accuracy"] > by_name["random_principle"]["accuracy"] + 0.03
    assert by_name["linear"]["accuracy"] == pytest.approx(by_name["ceiling"]["accuracy"], abs=0.01)
    assert by_name["human_labels"]["accuracy"] == pytest.approx(0.5, abs=0.04)
    assert by_name["linear"]["num_judgements"] == 400
    assert by_name["human_labels"]["num_judgements"] == 90
    assert by_name["ceiling"]["num_judgements"] == 600 * 4
    assert by_name["bayes"]["accuracy"] == pytest.approx(0.8)
    assert fit.notes == ()
    assert [len(fit.differences), len(fit.ablation.removed), len(fit.ablation.dropped)] == [
        14,
        4,
        4,
    ]


def test_the_linear_accuracy_is_that_of_the_fitted_regression(made):
    fit = fit_reward(made, CONFIG, seed=0)
    reward = RewardFunction.from_artifacts(json.loads(json.dumps(fit.weights)), "linear", CONFIG)
    agree = (reward(made.test.scores_a_NK).reward_B > reward(made.test.scores_b_NK).reward_B) == (
        made.test.labels_N == 1.0
    )
    linear = fit.scalarizers[0]
    assert linear["accuracy"] == pytest.approx(agree.mean())
    assert fit.ablation.removed[0]["accuracy"] == pytest.approx(agree.mean(), abs=2e-3)
    factor = made.normaliser.std_K / np.array(list(fit.weights["diff_scale"].values()))
    for key in ("weight", "low", "high"):
        on_z = np.array([entry[key] for entry in fit.weights["weights"].values()])
        per_difference = np.array([entry[key] for entry in fit.weights["coefficients"].values()])
        np.testing.assert_allclose(on_z, per_difference * factor, rtol=1e-9)
    assert fit.weights["weights"]["sycophancy"]["high"] < 0.0


def test_removing_principles_costs_accuracy(made):
    fit = fit_reward(made, CONFIG, seed=0)
    curve = [row["accuracy"] for row in fit.ablation.removed]
    assert curve[0] > curve[2] > curve[3] > 0.5
    loss = {row["principle"]: row["loss"] for row in fit.ablation.dropped}
    assert max(loss, key=loss.get) in ("helpfulness", "sycophancy")
    assert fit.ablation.dropped[0]["accuracy_without"] == pytest.approx(
        curve[0] - loss["helpfulness"]
    )


def test_same_inputs_and_seed_give_the_same_bytes(made, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_reward(tmp_path / name, fit_reward(made, CONFIG, seed=0))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_written_files_hold_the_documented_columns(made, tmp_path):
    rows = write_reward(tmp_path, fit_reward(made, CONFIG, seed=0))
    assert rows == {
        "pairs": 600,
        "scalarizers": 10,
        "accuracy_difference": 14,
        "ablation": 4,
        "drop_one": 4,
    }
    with (tmp_path / "scalarizers.csv").open(encoding="utf-8") as stream:
        assert list(csv.DictReader(stream).fieldnames or ()) == [
            "name",
            "kind",
            "accuracy",
            "low",
            "high",
            "num",
            "num_judgements",
        ]
    weights = json.loads((tmp_path / "weights.json").read_text(encoding="utf-8"))
    assert weights["fitted"] is True
    assert weights["ceiling"]["num"] == 1500


def test_configured_weights_are_used_as_they_are(made):
    config = RewardConfig(weights={"detail": 2.0, "bias": -1}, num_bootstrap=10)
    fit = fit_reward(made, config, seed=0)
    weights = {name: entry["weight"] for name, entry in fit.weights["weights"].items()}
    assert weights == {"helpfulness": 0.0, "bias": -1.0, "detail": 2.0, "sycophancy": 0.0}
    assert fit.weights["fitted"] is False
    assert np.isnan(fit.weights["weights"]["detail"]["low"])
    assert fit.scalarizers[0]["num_judgements"] == 200
    assert len(fit.ablation.removed) == 4


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"helpfullness": 1.0},
            "reward.weights: unknown principle 'helpfullness'; did you mean 'helpfulness'?",
        ),
        ({"detail": 0.0}, "reward.weights gives every principle 0"),
        ({}, "reward.weights gives every principle 0"),
    ],
)
def test_bad_configured_weights_are_named(made, weights, message):
    with pytest.raises(ConfigError) as caught:
        fit_reward(made, RewardConfig(weights=weights), seed=0)
    assert message in str(caught.value)


def unlabelled(pairs):
    return dataclasses.replace(pairs, labels_N=np.full(len(pairs), np.nan))


def test_without_any_label_all_weights_are_one_and_a_note_says_so(made):
    bare = dataclasses.replace(made, weights=unlabelled(made.weights), test=unlabelled(made.test))
    fit = fit_reward(bare, CONFIG, seed=0)
    assert {entry["weight"] for entry in fit.weights["weights"].values()} == {1.0}
    assert fit.weights["source"] == "ones"
    assert fit.scalarizers == []
    assert any("weight 1" in note for note in fit.notes)
    assert any("accuracies are left empty" in note for note in fit.notes)
    assert all(scale > 0 for scale in fit.weights["diff_scale"].values())


def test_a_few_labels_are_an_error_not_a_guess(made):
    labels_N = made.weights.labels_N.copy()
    labels_N[10:] = np.nan
    few = dataclasses.replace(made, weights=dataclasses.replace(made.weights, labels_N=labels_N))
    with pytest.raises(DataError, match="10 pairs of split 'weights' have a human label"):
        fit_reward(few, CONFIG, seed=0)


def test_pairs_with_a_missing_score_are_left_out_and_counted_up_to_the_limit(made):
    scores = made.weights.scores_a_NK.copy()
    scores[:12, 1] = np.nan
    holey = dataclasses.replace(made, weights=dataclasses.replace(made.weights, scores_a_NK=scores))
    fit = fit_reward(holey, CONFIG, seed=0)
    assert (fit.weights["num_pairs"], fit.weights["num_incomplete"]) == (588, 12)
    scores[:300] = np.nan
    with pytest.raises(
        DataError, match=r"split 'weights': .*% of the preference models' scores are missing"
    ):
        fit_reward(holey, CONFIG, seed=0)


def test_without_judgements_there_is_no_ceiling(made):
    fit = fit_reward(dataclasses.replace(made, judge_odds={}), CONFIG, seed=0)
    assert fit.weights["ceiling"] is None
    assert "ceiling" not in {row["name"] for row in fit.scalarizers}
    assert fit.notes == ("too few pairs with both human labels and judgements: no ceiling",)


def contradicted(pairs):
    """Differences of the same sizes, but people choose against every principle every time."""
    return -(2.0 * pairs.labels_N - 1.0)[:, None] * np.abs(pairs.differences_NK)


def test_a_judge_whom_people_contradict_costs_the_ceiling_alone(made):
    odds = {
        pair_id: dict(zip(made.weights.principles, row, strict=True))
        for pair_id, row in zip(made.weights.pair_ids, contradicted(made.weights), strict=True)
    }
    config = CONFIG.model_copy(update={"nonnegative": True})
    fit = fit_reward(dataclasses.replace(made, judge_odds=odds), config, seed=0)
    assert fit.weights["source"] == "fitted"
    assert fit.weights["ceiling"] is None
    (note,) = fit.notes
    assert note.startswith("no ceiling: reward.nonnegative leaves no principle a weight")


def test_configured_weights_need_no_fit_that_nonnegative_forbids(made):
    train = made.weights
    train.scores_a_NK[:] = train.scores_b_NK + contradicted(train)
    update = {"nonnegative": True, "weights": dict.fromkeys(train.principles, 1.0)}
    fit = fit_reward(made, CONFIG.model_copy(update=update), seed=0)
    assert fit.weights["source"] == "config"
    assert fit.weights["coefficients"] == {}
    assert fit.ablation.removed == []
    assert [note.split(": ")[0] for note in fit.notes] == [
        "no fit beside the configured weights, so no ablation"
    ]


def test_a_principle_on_which_the_judge_is_silent_leaves_the_ceiling_standing(made):
    odds = {pair_id: {**row, "bias": 0.0} for pair_id, row in made.judge_odds.items()}
    fit = fit_reward(dataclasses.replace(made, judge_odds=odds), CONFIG, seed=0)
    assert fit.weights["weights_on_judge"]["bias"] == 0.0
    assert fit.weights["ceiling"]["num"] == 1500


def test_draws_start_with_the_configured_one_and_keep_signs(made):
    base = RewardFunction.from_artifacts(fit_reward(made, CONFIG, seed=0).weights, "linear", CONFIG)
    draws = make_draws("soft_max_min", base, CONFIG, num_draws=40, spread=0.5, seed=3)
    again = make_draws("soft_max_min", base, CONFIG, num_draws=40, spread=0.5, seed=3)
    assert len(draws) == 40
    np.testing.assert_array_equal(draws[0].weights_K, base.weights_K)
    assert draws[0].params == {"temperature": 1.0}
    for draw, twin in zip(draws, again, strict=True):
        np.testing.assert_array_equal(np.sign(draw.weights_K), np.sign(base.weights_K))
        np.testing.assert_array_equal(draw.weights_K, twin.weights_K)
        assert draw.params == twin.params
    log_factor = np.log(np.array([draw.weights_K for draw in draws[1:]]) / base.weights_K)
    assert log_factor.std() == pytest.approx(0.5, abs=0.1)
    assert draws[5].weight_scale == pytest.approx(np.exp(log_factor[4].mean()))


def test_the_best_draw_is_chosen_on_weights_and_reported_on_test(made):
    base = RewardFunction.from_artifacts(fit_reward(made, CONFIG, seed=0).weights, "linear", CONFIG)
    rows = []
    for name in ALL_SCALARIZERS:
        draws = make_draws(name, base, CONFIG, num_draws=6, spread=0.5, seed=3)
        rows += evaluate_draws(draws, base, CONFIG, made.weights, made.test)
    best = choose_best(rows, base, CONFIG, made.test, seed=0)
    mine = [row for row in rows if row["scalarizer"] == best["best"]]
    winner = max(mine, key=lambda row: row["accuracy_weights"])
    entry = best["scalarizers"][best["best"]]
    assert entry["trial"] == winner["trial"]
    assert entry["accuracy"] == pytest.approx(winner["accuracy"])
    assert entry["low"] <= entry["accuracy"] <= entry["high"]
    assert choose_best([], base, CONFIG, made.test, seed=0)["best"] is None


def test_only_usable_answers_to_principles_become_odds():
    made_of = {"position_bias": 0.0, "reason": "", "judge": "rules"}
    judgements = [
        Judgement("p", "bias", "ok", 1.5, **made_of),
        Judgement("p", "detail", "unusable", float("nan"), **made_of),
        Judgement("p", "general", "ok", 2.0, **made_of),
        Judgement("q", "bias", "tie", 0.01, **made_of),
    ]
    assert collect_odds(judgements, ("bias", "detail")) == {"p": {"bias": 1.5}, "q": {"bias": 0.01}}


def test_damaged_score_tables_are_named(tmp_path):
    from morlaif_ray.artifacts import write_table

    path = tmp_path / "scores_test.parquet"
    with pytest.raises(ArtifactError, match=r"scores_test\.parquet: missing"):
        read_pair_scores(path, ("bias",), (), {})
    write_table(path, {"pair_id": ["p"], "human_label": [0.5], "a_bias": [1.0], "b_bias": [None]})
    with pytest.raises(DataError, match=r"row 0 has human_label 0\.5"):
        read_pair_scores(path, ("bias",), (), {})
    write_table(
        path,
        {
            "pair_id": ["p", "q"],
            "human_label": [None, 1.0],
            "a_bias": [1.0, 2.0],
            "b_bias": [None, 3.0],
        },
    )
    with pytest.raises(ArtifactError, match="column 'a_detail' is missing"):
        read_pair_scores(path, ("bias", "detail"), (), {})
    read = read_pair_scores(path, ("bias",), (), {"p": "prompt"})
    assert read.prompt_ids == ("prompt", "q")
    assert read.complete().pair_ids == ("q",)
