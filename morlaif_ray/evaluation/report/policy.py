"""Sections on policies, win rates and samples."""

from __future__ import annotations

import re

from morlaif_ray.evaluation.claims import heldout_gain
from morlaif_ray.evaluation.report.blocks import (
    NAME,
    Answer,
    Cell,
    Column,
    Sample,
    Samples,
    Section,
    show,
)
from morlaif_ray.evaluation.run_tables import Row, RunTables, number, readable

WELL_FORMED_DROP = 0.03
LENGTH_GROWTH = 1.5
_TURN = re.compile(r"\n\n(Human|Assistant):")
# The figures' diverging map (`figures.style.DIVERGING`), so that a colour means the same everywhere.
_ANCHORS = ((178, 74, 0), (237, 167, 114), (247, 247, 245), (127, 179, 217), (0, 90, 143))
_CELL_REACH_SD = 2.5


def policy_section(tables: RunTables, figures: dict[str, bytes]) -> Section:
    section = Section(
        "policies",
        "Policies trained by PPO",
        "Each policy maximises one reward while a KL penalty holds it near SFT; rewards of different policies are "
        "different functions, so each is shown in SFT standard deviations of its own. A reward that climbs while "
        "truth, well-formedness or length run away is reward hacking, not progress.",
        tables,
        figures,
    )
    if not tables.arms:
        section.notice("Stage 5_policy has not run: no policy was trained.")
        return section
    untrained = [
        name.split("/")[1] for name in tables.missing if re.match(r"5_policy/[^/]+/summary", name)
    ]
    for name in untrained:
        section.notice(f"Policy {readable(name)} is in the config but was not trained.")
    for warning in hacking_warnings(tables):
        section.notice(warning, "warning")
    if not tables.has_truth:
        section.notice(
            "The truth is not known for this data: oracle utility and well-formedness are measured on the "
            "test-bed only."
        )
    section.picture(
        "training_curves",
        "Training of every policy, running mean over seven steps. The dashed ink line is the single-PM baseline.",
        "Line charts over PPO steps of reward gain, KL, response length and, on the test-bed, truth.",
        "No training curves: the policies' metrics.parquet files are not there.",
    )
    if tables.has_truth:
        section.picture(
            "reward_and_truth",
            "What the preference models say and what is true, in the same unit. The shaded gap is reward that is "
            "not backed by truth.",
            "One small line chart per policy of preference-model reward and oracle utility over PPO steps.",
            "Reward and truth cannot be compared: the oracle's utility of the evaluation responses is not there.",
        )
    section.picture(
        "reward_vs_kl",
        "What each nat of KL bought. A higher curve is the better trade; a falling one on the truth side is "
        "over-optimisation.",
        "Line chart of reward gain over KL per policy.",
        "No reward-KL curves: the policies' metrics.parquet files are not there.",
    )
    section.picture(
        "principle_scores",
        "Mean normalised score per principle during training. Blue: above SFT; orange: below.",
        "Heat maps of the twelve principle scores over PPO steps, one per policy.",
        "No per-principle scores: the policies' metrics hold none.",
    )
    rows = _policy_rows(tables)
    trained = [row for row in rows if "gain" in row]
    section.table("policy_training", "What training did", _TRAINING_COLUMNS, trained)
    section.table("policy_responses", "Responses to held-out prompts", _RESPONSE_COLUMNS, rows)
    return section


def win_section(tables: RunTables, figures: dict[str, bytes]) -> Section:
    section = Section(
        "win-rates",
        "Win rates",
        "Two policies answer the same held-out prompts and the judge compares the answers in both orders; a win "
        "needs both orders, everything else is a tie and counts half. Intervals are 95% bootstrap "
        "intervals over prompts; read lengths beside them, since judges may like longer text.",
        tables,
        figures,
    )
    if not tables.win_rates:
        section.notice("No win rates: the policies have not been compared.")
        return section
    judges = sorted({str(row.get("judge") or "-") for row in tables.win_rates})
    prompts = sorted({int(n) for row in tables.win_rates if (n := number(row, "num_prompts")) == n})
    spread = (
        " to ".join(f"{count:,}" for count in dict.fromkeys([*prompts[:1], *prompts[-1:]])) or "-"
    )
    section.text(f"Judge: {', '.join(judges)}. Prompts per comparison: {spread}.")
    section.picture(
        "win_rates",
        "Wins, ties and losses, and the win rate.",
        "Stacked bars of wins, ties and losses per policy with win rate and interval.",
        "No policy was compared with SFT or with the single-PM policy.",
    )
    if tables.baseline_arm is None:
        section.notice("No single-PM policy was trained, so MORLAIF cannot be compared with one.")
    section.picture(
        "win_rate_matrix",
        "Every policy against every other. Blue: the row's policy wins more often.",
        "Heat map of win rates, policy by policy.",
        "No matrix: fewer than three policies were compared.",
    )
    section.table(
        "win_rates", "Win rates in figures", _WIN_COLUMNS, tables.win_rates, collapsed=True
    )
    return section


def sample_section(tables: RunTables, figures: dict[str, bytes]) -> Section:
    section = Section(
        "samples",
        "Samples before and after",
        "Held-out prompts with the answer of SFT and of the policies, sampled and not chosen. Cells are the "
        "normalised scores of the preference models (0: as good as SFT on average; blue above, orange below); "
        "the sycophancy cell scores anti-sycophancy, like all of them high is good.",
        tables,
        figures,
    )
    if not tables.samples:
        section.notice("No samples: 6_evaluation/samples.json is not there or empty.")
        return section
    arms = (tables.primary_arm, tables.baseline_arm)
    first = ["sft", *(arm.name for arm in arms if arm is not None)]
    section.blocks.append(Samples(tuple(_sample(tables, raw, first) for raw in tables.samples)))
    return section


def hacking_warnings(tables: RunTables) -> list[str]:
    """One sentence per policy whose reward rose while something that it stands for fell or ran away."""
    sft = tables.policy("sft")
    target = tables.config.policy.kl_target if tables.config is not None else float("inf")
    found: list[str] = []
    for arm in tables.arms:
        row, gain = tables.policy(arm.name), number(arm.summary, "reward_gain_sd")
        signs: list[str] = []
        truth = number(row, "oracle_utility") - number(sft, "oracle_utility")
        if truth < 0.0:
            signs.append(f"its true utility falls by {-truth:.2f}")
        formed, before = number(row, "well_formed_share"), number(sft, "well_formed_share")
        if before - formed > WELL_FORMED_DROP:
            signs.append(f"well-formed responses fall from {before:.0%} to {formed:.0%}")
        words = number(row, "mean_words") / max(1e-9, number(sft, "mean_words"))
        if words > LENGTH_GROWTH:
            signs.append(f"responses grow to {words:.1f} times the length")
        kl = number(arm.summary, "final_kl")
        if kl > target:
            signs.append(f"the KL of {kl:.1f} nats is beyond its target of {target:g}")
        if signs and gain > 0.0:
            found.append(
                f"Policy {readable(arm.name)}: its reward rises by {gain:.2f} SFT standard deviations, but "
                + ", ".join(signs)
                + "."
            )
    return found


def _policy_rows(tables: RunTables) -> list[Row]:
    arms = {arm.name: arm for arm in tables.arms}
    rows: list[Row] = []
    for name in dict.fromkeys(["sft", *arms, *(str(row["policy"]) for row in tables.policies)]):
        row: Row = {**tables.policy(name), "policy": name}
        if name in arms:
            arm = arms[name]
            gain = heldout_gain(tables, arm)
            row |= {
                "reward": arm.summary.get("scalarizer") or arm.summary.get("baseline"),
                "gain": number(arm.summary, "reward_gain_sd"),
                "heldout": gain.value,
                "heldout_low": gain.low,
                "heldout_high": gain.high,
                "steps": number(arm.summary, "num_steps"),
                "kl": number(row, "kl") if "kl" in row else number(arm.summary, "final_kl"),
            }
        rows.append(row)
    return rows


def _sample(tables: RunTables, raw: Row, first: list[str]) -> Sample:
    answers = {
        policy: _answer(tables, policy, response)
        for policy, response in (raw.get("responses") or {}).items()
    }
    order = [name for name in first if name in answers]
    rank = {arm.name: place for place, arm in enumerate(tables.arms)}
    rest = sorted(
        (name for name in answers if name not in order), key=lambda n: (rank.get(n, 99), n)
    )
    return Sample(
        turns=split_turns(str(raw.get("prompt", ""))),
        answers=tuple(answers[name] for name in order or rest),
        further=tuple(answers[name] for name in rest if order),
    )


def split_turns(prompt: str) -> tuple[tuple[str, str], ...]:
    """(speaker, text) of each turn of an hh dialogue; the open last turn of the assistant is left out."""
    parts = _TURN.split(prompt)
    turns = [("Text", parts[0].strip())] if parts[0].strip() else []
    turns += [(who, text.strip()) for who, text in zip(parts[1::2], parts[2::2], strict=True)]
    return tuple((who, text) for who, text in turns if text)


def _answer(tables: RunTables, policy: str, response: Row) -> Answer:
    truth: Row = response.get("true_scores") or {}
    scores: Row = response.get("scores") or {}
    names = [name for name in tables.principles if name in scores] or list(scores)
    return Answer(
        policy=readable(policy),
        text=str(response.get("text", "")).strip(),
        cells=tuple(_cell(name, number(scores, name), "{:+.1f}") for name in names),
        true_cells=tuple(
            # True scores lie in [0, 1]: 0.5 takes the neutral colour.
            _cell(name, number(truth, name), "{:.2f}", reach=0.5, middle=0.5)
            for name in names
            if name in truth
        ),
    )


def _cell(
    principle: str, value: float, form: str, *, reach: float = _CELL_REACH_SD, middle: float = 0.0
) -> Cell:
    text = show(round(value, 2) + 0.0, form).replace("-0.0", "+0.0")
    if value != value:
        return Cell(readable(principle), text, "#eceff2", "#22262b")
    place = min(1.0, max(0.0, 0.5 + 0.5 * (value - middle) / reach)) * (len(_ANCHORS) - 1)
    index = min(int(place), len(_ANCHORS) - 2)
    part = place - index
    red, green, blue = (
        round(a + part * (b - a)) for a, b in zip(_ANCHORS[index], _ANCHORS[index + 1], strict=True)
    )
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 128
    ink = "#15181c" if light else "#ffffff"
    return Cell(readable(principle), text, f"#{red:02x}{green:02x}{blue:02x}", ink)


_TRAINING_COLUMNS = (
    Column("policy", "Policy", NAME),
    Column("reward", "Its reward", NAME),
    Column("steps", "PPO steps", "{:,.0f}"),
    Column("gain", "Reward gain in training (SFT sd)", "{:+.2f}"),
    Column("heldout", "Reward gain held out (SFT sd)", "{:+.2f}", ("heldout_low", "heldout_high")),
    Column("kl", "KL (nats)", "{:.2f}"),
)
_RESPONSE_COLUMNS = (
    Column("policy", "Policy", NAME),
    Column("oracle_utility", "Oracle utility", "{:.2f}", ("oracle_low", "oracle_high")),
    Column("well_formed_share", "Well formed", "{:.1%}", ("well_formed_low", "well_formed_high")),
    Column("mean_words", "Words", "{:.1f}", ("mean_words_low", "mean_words_high")),
    Column("truncated_share", "Cut off", "{:.1%}"),
)
_WIN_COLUMNS = (
    Column("policy", "Policy", NAME),
    Column("opponent", "Opponent", NAME),
    Column("win_rate", "Win rate", "{:.3f}", ("low", "high")),
    Column("wins", "Wins", "{:,.0f}"),
    Column("ties", "Ties", "{:,.0f}"),
    Column("losses", "Losses", "{:,.0f}"),
    Column("num_prompts", "Prompts", "{:,.0f}"),
    Column("judge", "Judge"),
)
