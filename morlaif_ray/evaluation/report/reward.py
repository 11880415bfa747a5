"""Sections on weights and scalarizers, and on the sweep."""

from __future__ import annotations

import math

from morlaif_ray.evaluation.claims import weight_in_words
from morlaif_ray.evaluation.report.blocks import NAME, Column, Section, show, show_interval
from morlaif_ray.evaluation.run_tables import Row, RunTables, interval, number

_ACCURACY = Column("accuracy", "Accuracy", "{:.3f}", ("low", "high"))


def reward_section(tables: RunTables, figures: dict[str, bytes]) -> Section:
    section = Section(
        "reward",
        "Weights and scalarizers",
        "A logistic regression of the human label on score differences gives each principle a signed weight; a "
        "scalarizer turns the scores of a response into one reward. Multi-objective accuracy is the share "
        "of held-out pairs whose human-chosen response gets the higher reward; no reward can beat the "
        "ceiling (perfect preference models) except by luck, nor the Bayes line (noise of the labels).",
        tables,
        figures,
    )
    if not tables.weights and not tables.scalarizers:
        section.notice("Stage 4_reward has not run: there are no weights.")
        return section
    _weights(section, tables)
    section.picture(
        "scalarizer_accuracy",
        "Agreement with people on held-out pairs, ties half, 95% bootstrap intervals.",
        "Dot chart of accuracy per scalarizer and baseline with chance, ceiling and Bayes lines.",
        "No accuracies of scalarizers: 4_reward/scalarizers.csv is not there.",
    )
    section.table(
        "scalarizers",
        "Accuracies in figures",
        _SCALARIZER_COLUMNS,
        tables.scalarizers,
        collapsed=True,
    )
    section.table(
        "accuracy_difference",
        "Multi-objective minus single-objective, paired over the same test pairs",
        (
            Column("scalarizer", "Scalarizer", NAME),
            Column("baseline", "Baseline", NAME),
            Column("difference", "Difference in accuracy", "{:+.3f}", ("low", "high")),
        ),
        tables.accuracy_difference,
        collapsed=True,
    )
    section.picture(
        "ablation",
        "Left: accuracy while principles are removed (Figure 5b of the paper), mean over removal orders. Right: "
        "accuracy lost when one principle is removed and the weights are fitted again.",
        "Line chart of accuracy over the number of removed principles, and bars of the loss per principle.",
        "No ablation: 4_reward/ablation.csv is not there.",
    )
    section.table(
        "drop_one",
        "Removing one principle, in figures",
        (
            Column("principle", "Principle", NAME),
            Column("accuracy_without", "Accuracy without it", "{:.3f}"),
            Column("loss", "Accuracy lost", "{:+.4f}"),
        ),
        tables.drop_one,
        collapsed=True,
    )
    return section


def sweep_section(tables: RunTables, figures: dict[str, bytes]) -> Section:
    section = Section(
        "sweep",
        "Sweep over scalarizers and weights",
        "Offline, weights are drawn around the fitted ones and each scalarizer's parameter over its range, all "
        "scored on cached scores of the test pairs; online, short PPO runs are made. The highest of many draws is "
        "flattered by the choice: read the spread, and the draw that was chosen on the pairs of another split.",
        tables,
        figures,
    )
    section.picture(
        "sweep",
        "Every offline draw. A scalarizer whose dots lie close together does not depend on exact weights.",
        "Strip chart of accuracy per scalarizer over draws, and scatter charts over parameters.",
        "No offline sweep was run.",
    )
    section.table(
        "sweep_offline", "Offline draws per scalarizer", _SWEEP_COLUMNS, _per_scalarizer(tables)
    )
    if not tables.sweep_online:
        section.notice(
            "No online sweep was run (set sweep.online_steps above 0 to compare short PPO runs)."
        )
    section.table("sweep_online", "Online: short PPO runs", _ONLINE_COLUMNS, tables.sweep_online)
    return section


def _weights(section: Section, tables: RunTables) -> None:
    if not tables.weights:
        section.notice("No weights: 4_reward/weights.json is not there.")
        return
    found = tables.weights
    how = (
        f"The weights were fitted on {show(number(found, 'num_pairs'), '{:,.0f}')} pairs that no preference "
        f"model was trained on (accuracy there {show(number(found, 'accuracy_train'))})."
        if found.get("fitted", True)
        else "The weights stand in the config; they were not fitted."
    )
    ceiling = interval(found.get("ceiling") or {}, "accuracy")
    if not math.isnan(ceiling.value):
        how += f" The same regression on the judge's own log-odds, the ceiling, reaches {show_interval(ceiling)}."
    section.text(how)
    section.picture(
        "weights",
        "Signed weights with 95% bootstrap intervals, and what each rewards. The model named sycophancy scores "
        "anti-sycophancy, so a negative weight on it rewards sycophancy.",
        "Dot chart of the weight of each principle with interval and its meaning in words.",
        "No weights to show.",
    )
    on_judge = found.get("weights_on_judge") or {}
    rows: list[Row] = [
        {
            "principle": name,
            "meaning": weight_in_words(name, interval(row, "weight")),
            "on_judge": number(on_judge, name),
            **row,
        }
        for name, row in sorted(
            (found.get("weights") or {}).items(),
            key=lambda item: (
                tables.principles.index(item[0]) if item[0] in tables.principles else 99
            ),
        )
    ]
    section.table("weights", "Weights in figures", _WEIGHT_COLUMNS, rows, collapsed=True)


def _per_scalarizer(tables: RunTables) -> list[Row]:
    rows: list[Row] = []
    for name in dict.fromkeys(str(row["scalarizer"]) for row in tables.sweep_offline):
        own = [row for row in tables.sweep_offline if row["scalarizer"] == name]
        values = sorted(
            number(row, "accuracy") for row in own if row["accuracy"] == row["accuracy"]
        )
        if not values:
            continue
        best: Row = (tables.sweep_best.get("scalarizers") or {}).get(name) or {}
        parameters = best.get("parameters") or {}
        rows.append(
            {
                "scalarizer": name,
                "draws": len(values),
                "median": values[len(values) // 2],
                "lowest": values[0],
                "highest": values[-1],
                "chosen": number(best, "accuracy"),
                "chosen_low": number(best, "low"),
                "chosen_high": number(best, "high"),
                "parameter": ", ".join(f"{key} = {value:.3g}" for key, value in parameters.items()),
            }
        )
    return rows


_WEIGHT_COLUMNS = (
    Column("principle", "Principle", NAME),
    Column("weight", "Weight", "{:+.3f}", ("low", "high")),
    Column("meaning", "What it does"),
    Column("on_judge", "Weight on the judge's log-odds", "{:+.3f}"),
)
_SCALARIZER_COLUMNS = (
    Column("name", "Reward", NAME),
    Column("kind", "Kind"),
    _ACCURACY,
    Column("num", "Pairs", "{:,.0f}"),
    Column("num_judgements", "Judgements behind it", "{:,.0f}"),
)
_SWEEP_COLUMNS = (
    Column("scalarizer", "Scalarizer", NAME),
    Column("draws", "Draws", "{:,.0f}"),
    Column("median", "Median accuracy", "{:.3f}"),
    Column("lowest", "Lowest", "{:.3f}"),
    Column("highest", "Highest", "{:.3f}"),
    Column("chosen", "Of the draw chosen on other pairs", "{:.3f}", ("chosen_low", "chosen_high")),
    Column("parameter", "Its parameter"),
)
_ONLINE_COLUMNS = (
    Column("trial", "Trial"),
    Column("scalarizer", "Scalarizer", NAME),
    Column("steps", "PPO steps", "{:,.0f}"),
    Column("reward_gain", "Reward gain (SFT sd)", "{:+.2f}"),
    Column("kl", "KL (nats)", "{:.2f}"),
    Column("oracle_gain", "Oracle gain", "{:+.3f}"),
    Column("win_rate", "Win rate", "{:.3f}"),
)
