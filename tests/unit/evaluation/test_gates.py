from __future__ import annotations

import math

import pytest

from morlaif_ray.evaluation import gates
from morlaif_ray.evaluation.gates import verdict
from morlaif_ray.types import Interval

NAN = math.nan
NOTHING = Interval(NAN, NAN, NAN, 0)


def accuracy(difference: Interval):
    return gates.pm_accuracy_gate(difference, scalarizer="linear", baseline="random principle")


def reward(gain: float, kl: float, low: float = NAN, high: float = NAN):
    return gates.reward_gate(
        Interval(gain, low, high, 64),
        arm="linear",
        final_kl=kl,
        kl_target=6.0,
        measured_on="held out",
    )


def wins(value: float, low: float, high: float):
    return gates.win_rate_gate(
        Interval(value, low, high, 256), arm="linear", opponent="SFT", judge="oracle"
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.01, 0.07, "holds"), (-0.01, 0.09, "cannot be told"), (-0.09, -0.01, "does not hold")],
)
def test_the_accuracy_claim_follows_the_paired_interval(low, high, expected):
    assert verdict(accuracy(Interval((low + high) / 2, low, high, 1790))) == expected


def test_the_accuracy_claim_shows_its_figures_and_the_other_baselines():
    gate = gates.pm_accuracy_gate(
        Interval(0.044, 0.026, 0.062, 1790),
        scalarizer="linear",
        baseline="random principle",
        others=[("human labels", Interval(0.017, -0.001, 0.035, 1790))],
    )
    assert gate.evidence == (
        "Difference +0.044 [+0.026, +0.062] over 1,790 held-out prompts. Against the other baselines: "
        "human labels +0.017 [-0.001, +0.035]."
    )


def test_an_opposite_finding_is_called_one():
    assert accuracy(Interval(-0.05, -0.09, -0.01, 100)).evidence.startswith(
        "The opposite was found"
    )


@pytest.mark.parametrize(
    ("gain", "kl", "expected", "words"),
    [
        (1.0, 6.0, True, "(target 6)."),
        (0.99, 6.0, False, "the gain is below 1"),
        (1.5, 6.1, False, "the KL is beyond its target"),
        (0.5, 9.0, False, "the gain is below 1 and the KL is beyond its target"),
    ],
)
def test_the_reward_claim_needs_one_sd_within_the_kl_target(gain, kl, expected, words):
    gate = reward(gain, kl)
    assert gate.holds is expected
    assert words in gate.evidence


@pytest.mark.parametrize(
    ("value", "low", "high", "expected", "words"),
    [
        (0.65, 0.59, 0.71, True, "Win rate 0.650 [0.590, 0.710] over 256 prompts (judge: oracle)"),
        (0.66, 0.49, 0.80, False, "reaches down to even"),
        (0.60, 0.54, 0.66, False, "better than even, but below 0.65"),
        (0.40, 0.34, 0.46, False, "the policy is worse than SFT"),
    ],
)
def test_the_win_rate_claim_needs_065_and_an_interval_above_even(value, low, high, expected, words):
    gate = wins(value, low, high)
    assert gate.holds is expected
    assert words in gate.evidence
    assert verdict(gate) != "cannot be told"


@pytest.mark.parametrize(("share", "expected"), [(0.94, True), (0.9399, False), (0.99, True)])
def test_well_formedness_may_fall_by_three_points_and_no_more(share, expected):
    assert gates.well_formed_gate(share, 0.97, arm="linear").holds is expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.5, -0.3, "holds"), (-0.5, 0.1, "cannot be told"), (0.1, 0.3, "does not hold")],
)
def test_the_sign_claim_needs_the_whole_interval_below_zero(low, high, expected):
    weight = Interval((low + high) / 2, low, high, 1190)
    gate = gates.negative_weight_gate(weight, principle="sycophancy", meaning="rewards sycophancy")
    assert verdict(gate) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.51, 0.62, "holds"), (0.48, 0.60, "cannot be told"), (0.30, 0.45, "does not hold")],
)
def test_the_claim_against_the_single_pm_policy_follows_its_interval(low, high, expected):
    gate = gates.single_baseline_gate(
        Interval((low + high) / 2, low, high, 256),
        arm="linear",
        baseline_arm="single PM",
        baseline="random principle",
        judge="oracle",
    )
    assert verdict(gate) == expected


@pytest.mark.parametrize(
    "gate",
    [
        accuracy(NOTHING),
        reward(NAN, 3.0),
        reward(1.2, NAN),
        wins(NAN, NAN, NAN),
        gates.well_formed_gate(NAN, 0.9, arm="linear"),
        gates.negative_weight_gate(NOTHING, principle="sycophancy", meaning=""),
        gates.negative_weight_gate(Interval(-0.4, NAN, NAN, 5), principle="sycophancy", meaning=""),
    ],
)
def test_what_was_not_measured_cannot_be_told(gate):
    assert verdict(gate) == "cannot be told"
    assert not gate.holds
