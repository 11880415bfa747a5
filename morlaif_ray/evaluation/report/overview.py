"""Head and foot of the page: the summary, the headline figures, the claims, and what is needed to repeat the run."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from morlaif_ray import __version__
from morlaif_ray.evaluation.claims import heldout_gain
from morlaif_ray.evaluation.gates import verdict
from morlaif_ray.evaluation.report.blocks import show, show_interval
from morlaif_ray.evaluation.run_tables import READ_STAGES, RunTables, interval, number, readable
from morlaif_ray.types import GateReport, Interval

_VERDICT_CLASS = {"holds": "yes", "does not hold": "no", "cannot be told": "open"}


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Claim:
    claim: str
    verdict: str
    css_class: str
    evidence: str


@dataclass(frozen=True)
class StageLine:
    """One stage in the reproducibility table."""

    name: str
    content_hash: str
    code_version: str
    rows: str


def claims(gates: Sequence[GateReport]) -> list[Claim]:
    return [
        Claim(gate.claim, verdict(gate), _VERDICT_CLASS[verdict(gate)], gate.evidence)
        for gate in gates
    ]


def summary(tables: RunTables, gates: Sequence[GateReport]) -> str:
    """The run in one paragraph; sentences whose figures are missing are left out."""
    sentences = [_what_ran(tables)]
    multi, single = _accuracy(tables, "linear"), _accuracy(tables, "random_principle")
    if not math.isnan(multi.value):
        sentence = (
            f"On held-out pairs the linear multi-objective reward agrees with people {show_interval(multi)} of "
            f"the time"
        )
        if not math.isnan(single.value):
            sentence += (
                f", a single preference model trained on random principles {show_interval(single)}"
            )
        ceiling = interval(tables.weights.get("ceiling") or {}, "accuracy").value
        if not math.isnan(ceiling):
            sentence += f"; with perfect preference models it would be {ceiling:.3f}"
        sentences.append(sentence + ".")
    arm = tables.primary_arm
    if arm is not None:
        sentences += _policy_sentences(tables, arm.name)
    held = sum(gate.holds for gate in gates)
    open_claims = sum(verdict(gate) == "cannot be told" for gate in gates)
    ending = f" and {open_claims} cannot be told" if open_claims else ""
    sentences.append(f"Of {len(gates)} claims checked below, {held} hold{ending}.")
    return " ".join(sentence for sentence in sentences if sentence)


def tiles(tables: RunTables) -> list[Tile]:
    """Four headline figures; a figure that was not measured shows as "-"."""
    multi, single = _accuracy(tables, "linear"), _accuracy(tables, "random_principle")
    arm, baseline = tables.primary_arm, tables.baseline_arm
    name = arm.name if arm is not None else "linear"
    against_sft = interval(tables.win_row(name, "sft"), "win_rate", num="num_prompts")
    other = baseline.name if baseline is not None else ""
    against_single = interval(tables.win_row(name, other), "win_rate", num="num_prompts")
    gain = heldout_gain(tables, arm) if arm is not None else _nothing()
    if arm is not None and math.isnan(gain.value):
        gain = Interval(number(arm.summary, "reward_gain_sd"), math.nan, math.nan, 0)
    kl = number(arm.summary, "final_kl") if arm is not None else math.nan
    shown = readable(name)
    return [
        Tile(
            "Multi-objective accuracy",
            show(multi.value),
            f"{_range(multi)}single-objective {show(single.value)}",
        ),
        Tile(
            "Reward gain by PPO",
            show(gain.value, "{:+.2f} sd"),
            f"{shown}, at a KL of {show(kl, '{:.1f}')} nats",
        ),
        Tile("Win rate against SFT", show(against_sft.value), f"{_range(against_sft)}{shown}"),
        Tile(
            "Win rate against single PM",
            show(against_single.value),
            f"{_range(against_single)}{shown}",
        ),
    ]


def stage_lines(tables: RunTables) -> list[StageLine]:
    """The published stages that the report was made from; 6_evaluation holds the report itself: no hash here."""
    lines = []
    for stage in READ_STAGES:
        manifest = tables.manifests.get(stage)
        if manifest is None:
            lines.append(StageLine(stage, "-", "-", "not published"))
            continue
        rows = ", ".join(f"{name} {count:,}" for name, count in manifest.rows.items())
        lines.append(
            StageLine(stage, manifest.content_hash[:16], manifest.code_version, rows or "-")
        )
    return lines


def versions() -> str:
    """The software that drew this page."""
    parts = [f"morlaif-ray {__version__}", f"Python {platform.python_version()}"]
    parts += [f"{name} {version(name)}" for name in ("numpy", "matplotlib", "pyarrow")]
    return ", ".join(parts)


def config_text(tables: RunTables) -> str:
    path = tables.run_dir / "config.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _what_ran(tables: RunTables) -> str:
    principles, policies = len(tables.principles), len(tables.arms)
    if not principles:
        return "This run has not reached its feedback yet."
    judge = tables.feedback.get("judge")
    asked = f" of the judge {judge}" if judge else ""
    trained = (
        f" and {policies} {'policy' if policies == 1 else 'policies'} by PPO" if policies else ""
    )
    return f"From feedback{asked} on {principles} principles this run trained preference models{trained}."


def _policy_sentences(tables: RunTables, name: str) -> list[str]:
    found: list[str] = []
    against = interval(tables.win_row(name, "sft"), "win_rate")
    if not math.isnan(against.value):
        sentence = f"After PPO the policy {readable(name)} has a win rate of {show_interval(against)} against SFT"
        baseline = tables.baseline_arm
        if baseline is not None and tables.win_row(name, baseline.name):
            single = interval(tables.win_row(name, baseline.name), "win_rate")
            sentence += f" and of {show_interval(single)} against the single-PM policy"
        found.append(sentence + ".")
    words, before = (number(tables.policy(policy), "mean_words") for policy in (name, "sft"))
    formed, formed_before = (number(tables.policy(p), "well_formed_share") for p in (name, "sft"))
    if not math.isnan(words) and not math.isnan(before):
        sentence = f"Its responses have {words:.1f} words (SFT: {before:.1f})"
        if not math.isnan(formed) and not math.isnan(formed_before):
            sentence += f", {formed:.1%} of them well formed (SFT: {formed_before:.1%})"
        found.append(sentence + ".")
    return found


def _accuracy(tables: RunTables, name: str) -> Interval:
    rows = [row for row in tables.scalarizers if row["name"].removeprefix("baseline_") == name]
    return interval(rows[0], "accuracy") if rows else _nothing()


def _range(found: Interval) -> str:
    if math.isnan(found.low) or math.isnan(found.high):
        return ""
    return f"[{found.low:.3f}, {found.high:.3f}] · "


def _nothing() -> Interval:
    return Interval(math.nan, math.nan, math.nan, 0)
