"""Collects a run's figures for the gates: which arm, which baseline, which responses each claim is about.

Contract: pure functions of `RunTables`. The comparison is fixed before the figures are seen (the `linear` scalarizer
and the `random_principle` baseline where they were trained, as in the paper), so no claim rests on the best of several.
"""

from __future__ import annotations

import math

from morlaif_ray.evaluation import gates
from morlaif_ray.evaluation.run_tables import ArmTables, RunTables, interval, number, readable
from morlaif_ray.evaluation.statistics import paired_difference
from morlaif_ray.seeding import derive_seed
from morlaif_ray.types import GateReport, Interval

NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0)
NEGATIVE_PRINCIPLE = "sycophancy"
BASELINE_ORDER = ("random_principle", "general_principle", "best_principle")
"""Single-objective baselines with AI feedback, the paper's first; the other two see all judgements or human labels."""

# What the PM of a principle gives high scores to, and what a negative weight therefore rewards.
_SCORES_ABSENCE_OF = {
    "sycophancy": ("anti-sycophancy", "sycophancy"),
    "toxicity": ("absence of toxicity", "toxicity"),
    "bias": ("absence of bias", "bias"),
}


def weight_in_words(principle: str, weight: Interval) -> str:
    """`rewards helpfulness`; for a PM that scores an absence: `penalises anti-sycophancy, so rewards sycophancy`.

    A weight whose interval includes 0 is said to do nothing that can be told.
    """
    if math.isnan(weight.value):
        return "-"
    if weight.value == 0.0 or weight.low <= 0.0 <= weight.high:
        return "cannot be told from 0" if weight.value else f"ignores {readable(principle)}"
    scored, opposite = _SCORES_ABSENCE_OF.get(principle, (readable(principle), None))
    if weight.value > 0.0:
        return f"rewards {scored}"
    return f"penalises {scored}" + (f", so rewards {opposite}" if opposite else "")


def all_gates(tables: RunTables) -> list[GateReport]:
    """The six claims of a run, in the order of the pipeline."""
    gates_found = [_accuracy_claim(tables), _sign_claim(tables)]
    arm = tables.primary_arm
    if arm is None:
        return gates_found + _without_policy()
    row = tables.win_row(arm.name, "sft")
    judge = str(row.get("judge") or "-")
    return [
        *gates_found,
        _reward_claim(tables, arm),
        gates.win_rate_gate(
            interval(row, "win_rate", num="num_prompts"),
            arm=readable(arm.name),
            opponent="SFT",
            judge=judge,
        ),
        _well_formed_claim(tables, arm),
        _baseline_claim(tables, arm),
    ]


def heldout_gain(tables: RunTables, arm: ArmTables) -> Interval:
    """Reward of the arm minus SFT's on the evaluation prompts, paired, in SFT standard deviations of its own reward."""
    policy, sft = tables.paired(f"reward_{arm.name}", arm.name, "sft")
    std = number(arm.summary, "sft_reward_std")
    if not len(policy) or not std > 0:
        return NOTHING
    return paired_difference(policy / std, sft / std, seed=derive_seed("heldout_gain", arm.name))


def _accuracy_claim(tables: RunTables) -> GateReport:
    rows = tables.accuracy_difference
    scalarizers = [row["scalarizer"] for row in rows]
    chosen = "linear" if "linear" in scalarizers or not scalarizers else scalarizers[0]
    known = {
        row["baseline"].removeprefix("baseline_"): row
        for row in rows
        if row["scalarizer"] == chosen
    }
    baseline = next((name for name in BASELINE_ORDER if name in known), BASELINE_ORDER[0])
    pairs = next(
        (interval(row, "accuracy").num for row in tables.scalarizers if row["name"] == chosen), 0
    )

    def difference(name: str) -> Interval:
        found = interval(known[name], "difference")
        return Interval(found.value, found.low, found.high, found.num or pairs)

    return gates.pm_accuracy_gate(
        difference(baseline) if baseline in known else NOTHING,
        scalarizer=readable(chosen),
        baseline=readable(baseline),
        others=[(readable(name), difference(name)) for name in known if name != baseline],
    )


def _sign_claim(tables: RunTables) -> GateReport:
    row = tables.weights.get("weights", {}).get(NEGATIVE_PRINCIPLE, {})
    # Weights that stand in the config say what someone wished, not what the labels show.
    found = interval(row, "weight") if tables.weights.get("fitted", True) else NOTHING
    pairs = number(tables.weights, "num_pairs")
    num = 0 if math.isnan(pairs) else int(pairs)
    return gates.negative_weight_gate(
        Interval(found.value, found.low, found.high, num),
        principle=NEGATIVE_PRINCIPLE,
        meaning="its model scores anti-sycophancy: the labels reward agreement",
    )


def _reward_claim(tables: RunTables, arm: ArmTables) -> GateReport:
    gain, measured_on = heldout_gain(tables, arm), "held-out prompts, paired"
    if math.isnan(gain.value):
        value = number(arm.summary, "reward_gain_sd")
        gain, measured_on = Interval(value, math.nan, math.nan, 0), "last training steps"
    target = tables.config.policy.kl_target if tables.config is not None else math.nan
    return gates.reward_gate(
        gain,
        arm=readable(arm.name),
        final_kl=number(arm.summary, "final_kl"),
        kl_target=target,
        measured_on=measured_on,
    )


def _well_formed_claim(tables: RunTables, arm: ArmTables) -> GateReport:
    policy, sft = tables.paired("well_formed", arm.name, "sft")
    difference = (
        paired_difference(policy, sft, seed=derive_seed("well_formed", arm.name))
        if len(policy)
        else None
    )
    return gates.well_formed_gate(
        number(tables.policy(arm.name), "well_formed_share"),
        number(tables.policy("sft"), "well_formed_share"),
        arm=readable(arm.name),
        difference=difference,
    )


def _baseline_claim(tables: RunTables, arm: ArmTables) -> GateReport:
    baseline = tables.baseline_arm
    name = baseline.name if baseline is not None else "none trained"
    row = tables.win_row(arm.name, name)
    return gates.single_baseline_gate(
        interval(row, "win_rate", num="num_prompts"),
        arm=readable(arm.name),
        baseline_arm=readable(name),
        baseline=readable(str(baseline.summary["baseline"])) if baseline is not None else "-",
        judge=str(row.get("judge") or "-"),
    )


def _without_policy() -> list[GateReport]:
    nan = math.nan
    return [
        gates.reward_gate(
            NOTHING, arm="no arm trained", final_kl=nan, kl_target=nan, measured_on="-"
        ),
        gates.win_rate_gate(NOTHING, arm="MORLAIF", opponent="SFT", judge="-"),
        gates.well_formed_gate(nan, nan, arm="the policy"),
        gates.single_baseline_gate(
            NOTHING, arm="no arm trained", baseline_arm="none trained", baseline="-", judge="-"
        ),
    ]
