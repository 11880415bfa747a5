"""Which pairs are asked next: variances by hand, ties by content, the same choice in any order of rows."""

from __future__ import annotations

import numpy as np
import pytest

from morlaif_ray.config import parse_config
from morlaif_ray.config.selecting import SelectAll, SelectByDisagreement, SelectRandom
from morlaif_ray.errors import ConfigError
from morlaif_ray.feedback.selection import (
    BOOTSTRAP_SHARE,
    bootstrap_members,
    choose_pairs,
    disagreement,
    member_columns,
    member_labels,
    member_predictions,
    num_selected,
    random_order,
    round_sizes,
)

pytestmark = pytest.mark.unit

# Two members, three pairs, two principles. Variances: p (.9, .1 | .5, .5) -> .16, 0 -> mean .08;
# q (.6, .4 | .7, .3) -> .01, .04 -> .025; r (all .5) -> 0.
PREDICTIONS = np.array(
    [
        [[0.9, 0.5], [0.6, 0.7], [0.5, 0.5]],
        [[0.1, 0.5], [0.4, 0.3], [0.5, 0.5]],
    ]
)
IDS = ["p", "q", "r"]


def test_disagreement_is_the_members_variance_averaged_over_principles() -> None:
    assert disagreement(PREDICTIONS) == pytest.approx([0.08, 0.025, 0.0])


def test_the_pair_with_the_highest_disagreement_is_asked_first() -> None:
    assert choose_pairs(PREDICTIONS, IDS, [], 2, seed=0) == ["p", "q"]


def test_what_was_asked_already_is_passed_over_and_the_rest_may_run_out() -> None:
    assert choose_pairs(PREDICTIONS, IDS, {"p"}, 1, seed=0) == ["q"]
    assert choose_pairs(PREDICTIONS, IDS, {"p", "r"}, 5, seed=0) == ["q"]
    assert choose_pairs(PREDICTIONS, IDS, IDS, 5, seed=0) == []


def test_ties_are_broken_by_content_and_not_by_row() -> None:
    ids = [f"pair{i}" for i in range(20)]
    flat = np.full((3, 20, 2), 0.5)
    chosen = choose_pairs(flat, ids, [], 5, seed=1)
    assert choose_pairs(flat, ids[::-1], [], 5, seed=1) == chosen
    assert choose_pairs(flat, ids, [], 5, seed=2) != chosen
    assert chosen != ids[:5]


def test_an_ensemble_of_one_has_no_disagreement_to_speak_of() -> None:
    with pytest.raises(ValueError, match="members >= 2"):
        choose_pairs(PREDICTIONS[:1], IDS, [], 1, seed=0)


def test_each_member_sees_about_63_percent_and_every_judged_pair_is_seen() -> None:
    ids = [f"pair{i}" for i in range(2000)]
    inside = bootstrap_members(ids, 3, seed=0)
    assert inside.any(axis=0).all()
    # Standard error 0.011; the pairs given to an owner add (1 - 0.632)^3 / 3 = 0.017.
    assert inside.mean(axis=1) == pytest.approx([BOOTSTRAP_SHARE + 0.017] * 3, abs=0.04)
    assert not np.array_equal(inside[0], inside[1])


def test_a_members_sample_does_not_change_when_pairs_are_added() -> None:
    ids = [f"pair{i}" for i in range(50)]
    assert np.array_equal(bootstrap_members(ids, 4, 7)[:, :20], bootstrap_members(ids[:20], 4, 7))


def test_heads_labels_and_predictions_are_laid_out_member_by_member() -> None:
    assert member_columns(["x", "y"], 2) == ["x#0", "y#0", "x#1", "y#1"]
    log_odds = np.array([[1.0, 2.0], [3.0, np.nan]])
    labels = member_labels(log_odds, np.array([[True, False], [True, True]]))
    assert np.array_equal(
        labels, [[1.0, 2.0, 1.0, 2.0], [np.nan, np.nan, 3.0, np.nan]], equal_nan=True
    )
    predictions = member_predictions(np.array([[0.0, 1.0, 2.0, 1000.0]]), np.zeros((1, 4)), 2)
    assert predictions.shape == (2, 1, 2)
    assert predictions[0, 0] == pytest.approx([0.5, 0.73105858])
    assert predictions[1, 0] == pytest.approx([0.88079708, 1.0])


def test_random_order_is_seeded_and_independent_of_the_rows_order() -> None:
    ids = [f"pair{i}" for i in range(10)]
    assert random_order(ids, 0) == random_order(ids[::-1], 0)
    assert random_order(ids, 0) != random_order(ids, 1)
    assert sorted(random_order(ids, 0)) == ids


def test_rounds_share_the_pairs_evenly() -> None:
    assert round_sizes(10, 4) == [3, 3, 2, 2]
    assert round_sizes(8, 2) == [4, 4]


def test_a_forecast_knows_how_many_pairs_will_be_asked() -> None:
    assert num_selected(SelectAll(), 900) == 900
    assert num_selected(SelectRandom(num_pairs=100), 900) == 100
    assert num_selected(SelectByDisagreement(num_pairs=1000), 900) == 900


def test_select_is_a_config_section_whose_errors_say_what_to_write() -> None:
    config = parse_config(
        {"feedback": {"select": {"kind": "ensemble_disagreement", "num_pairs": 400}}}, "test"
    )
    assert config.feedback.select == SelectByDisagreement(num_pairs=400, rounds=4, ensemble_size=4)
    assert parse_config({}, "test").feedback.select == SelectAll()
    with pytest.raises(ConfigError, match="lower rounds or raise num_pairs"):
        parse_config(
            {"feedback": {"select": {"kind": "ensemble_disagreement", "num_pairs": 3}}}, "test"
        )
    with pytest.raises(ConfigError, match="num_pairs"):
        parse_config({"feedback": {"select": {"kind": "random"}}}, "test")
