"""The claims of a run, each checked against its measured figure.

Contract: pure functions from figures to a `GateReport`. A claim holds only where the figures carry it. Where they point
the other way it does not hold; where they were not measured, or the interval reaches over the line, it cannot be told,
and the evidence begins with `CANNOT_TELL`. `verdict` gives the three apart. NaN means "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from morlaif_ray.types import GateReport, Interval

Verdict = Literal["holds", "does not hold", "cannot be told"]

CANNOT_TELL = "Cannot be told: "
MIN_REWARD_GAIN_SD = 1.0
"""SFT standard deviations of the arm's own reward."""
MIN_WIN_RATE = 0.65
EVEN = 0.5
MAX_WELL_FORMED_LOSS = 0.03
"""Share of responses: three points."""


def verdict(gate: GateReport) -> Verdict:
    """`holds`, `does not hold` or `cannot be told`."""
    if gate.holds:
        return "holds"
    return "cannot be told" if gate.evidence.startswith(CANNOT_TELL) else "does not hold"


def pm_accuracy_gate(
    difference: Interval,
    *,
    scalarizer: str,
    baseline: str,
    others: Sequence[tuple[str, Interval]] = (),
) -> GateReport:
    """Multi-objective minus single-objective accuracy on the same pairs; holds where the interval is above 0.

    `others` are the same scalarizer's differences to further baselines: shown, not judged.
    """
    claim = (
        f"Multi-objective preference-model accuracy ({scalarizer}) is above the single-objective "
        f"baseline ({baseline})"
    )
    if math.isnan(difference.value):
        return _not_measured(claim, "no paired accuracy difference of the two was measured")
    found = f"difference {_signed(difference)} over {difference.num:,} held-out prompts"
    if others:
        rest = "; ".join(f"{name} {_signed(interval)}" for name, interval in others)
        found += f". Against the other baselines: {rest}"
    return _against_line(claim, difference, 0.0, found, "no difference")


def reward_gate(
    gain_sd: Interval, *, arm: str, final_kl: float, kl_target: float, measured_on: str
) -> GateReport:
    """Reward gain over SFT in SFT standard deviations, and the KL (nats per response) that it cost.

    Judged on the point estimate, as the claim is stated; the interval is shown. `measured_on` names the responses.
    """
    claim = (
        f"PPO lifts the scalar reward ({arm}) by at least one SFT standard deviation at a KL within "
        f"its target"
    )
    if math.isnan(gain_sd.value) or math.isnan(final_kl) or math.isnan(kl_target):
        return _not_measured(claim, "reward gain, KL or its target is missing")
    enough, within = gain_sd.value >= MIN_REWARD_GAIN_SD, final_kl <= kl_target
    gain = _signed(gain_sd, digits=2) if not math.isnan(gain_sd.low) else f"{gain_sd.value:+.2f}"
    evidence = (
        f"Reward gain {gain} SFT standard deviations ({measured_on}) at a KL of {final_kl:.2f} nats "
        f"(target {kl_target:g})"
    )
    problems = []
    if not enough:
        problems.append("the gain is below 1")
    if not within:
        problems.append("the KL is beyond its target")
    if problems:
        return GateReport(claim, False, f"{evidence}: {' and '.join(problems)}.")
    return GateReport(claim, True, evidence + ".")


def win_rate_gate(rate: Interval, *, arm: str, opponent: str, judge: str) -> GateReport:
    """Win rate at least 0.65 with its interval above 0.5."""
    claim = (
        f"Win rate of {arm} against {opponent} is at least {MIN_WIN_RATE}, its interval above 0.5"
    )
    if math.isnan(rate.value):
        return _not_measured(claim, "these two policies were not compared")
    found = f"Win rate {_plain(rate)} over {rate.num:,} prompts (judge: {judge})"
    if rate.value >= MIN_WIN_RATE and rate.low > EVEN:
        return GateReport(claim, True, found + ".")
    if rate.high < EVEN:
        return GateReport(claim, False, f"{found}: the policy is worse than {opponent}.")
    if rate.low > EVEN:
        return GateReport(claim, False, f"{found}: better than even, but below {MIN_WIN_RATE}.")
    return GateReport(claim, False, f"{found}: its interval reaches down to even or below.")


def well_formed_gate(
    share: float, sft_share: float, *, arm: str, difference: Interval | None = None
) -> GateReport:
    """Share of well-formed responses not more than three points below SFT's; `difference` is policy minus SFT."""
    claim = f"Well-formedness of {arm} is not more than 3 points below that of SFT"
    if math.isnan(share) or math.isnan(sft_share):
        return _not_measured(claim, "well-formedness is known on the test-bed only")
    evidence = f"Well-formed responses: {share:.1%} ({arm}) against {sft_share:.1%} (SFT)"
    if difference is not None and not math.isnan(difference.value):
        low, high = 100 * difference.low, 100 * difference.high
        evidence += f", difference {100 * difference.value:+.1f} points [{low:+.1f}, {high:+.1f}]"
    # The sum of two floats such as 0.97 - 0.94 may exceed 0.03 by rounding alone.
    if sft_share - share <= MAX_WELL_FORMED_LOSS + 1e-9:
        return GateReport(claim, True, evidence + ".")
    return GateReport(claim, False, evidence + ": text quality was traded for reward.")


def negative_weight_gate(weight: Interval, *, principle: str, meaning: str) -> GateReport:
    """The principle that people's labels go against gets a negative weight; holds where the interval is below 0.

    `meaning` says in words what a negative weight does ("rewards sycophancy").
    """
    claim = f"The fitted weight of {principle} is negative ({meaning})"
    if math.isnan(weight.value):
        return _not_measured(claim, f"no weight of {principle} was fitted")
    if math.isnan(weight.low) or math.isnan(weight.high):
        return _not_measured(claim, f"weight {weight.value:+.3f} has no interval")
    found = f"weight {_signed(weight)}, fitted on {weight.num:,} pairs"
    flipped = Interval(-weight.value, -weight.high, -weight.low, weight.num)
    return _against_line(claim, flipped, 0.0, found, "no weight at all")


def single_baseline_gate(
    rate: Interval, *, arm: str, baseline_arm: str, baseline: str, judge: str
) -> GateReport:
    """Policy trained on all principles against the policy trained on the single PM; interval above 0.5."""
    claim = f"MORLAIF ({arm}) beats the single-PM baseline policy ({baseline_arm}: {baseline})"
    if math.isnan(rate.value):
        return _not_measured(claim, "these two policies were not compared")
    found = f"win rate {_plain(rate)} over {rate.num:,} prompts (judge: {judge})"
    return _against_line(claim, rate, EVEN, found, "an even match")


def _against_line(
    claim: str, interval: Interval, line: float, found: str, neutral: str
) -> GateReport:
    if interval.low > line:
        return GateReport(claim, True, f"{found[0].upper()}{found[1:]}.")
    if interval.high < line:
        return GateReport(claim, False, f"The opposite was found: {found}.")
    return GateReport(claim, False, f"{CANNOT_TELL}the interval includes {neutral} ({found}).")


def _not_measured(claim: str, why: str) -> GateReport:
    return GateReport(claim, False, f"{CANNOT_TELL}{why}.")


def _plain(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _signed(interval: Interval, digits: int = 3) -> str:
    return f"{interval.value:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
