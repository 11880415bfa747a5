"""Figures of weights and scalarizers: weights, multi-objective accuracy, ablation, sweep."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from morlaif_ray.evaluation.claims import weight_in_words
from morlaif_ray.evaluation.figures import style
from morlaif_ray.evaluation.run_tables import Row, RunTables, interval, number, readable
from morlaif_ray.seeding import derive_seed


def weights(tables: RunTables) -> Figure | None:
    """Fitted weight of every principle with interval, and in words what it rewards."""
    rows: dict[str, Row] = tables.weights.get("weights", {})
    if not rows:
        return None
    names = [name for name in tables.principles if name in rows] or list(rows)
    found = [interval(rows[name], "weight") for name in names]
    figure = style.new_figure(0.9 + 0.29 * len(names))
    axes = figure.add_subplot()
    for place, item in enumerate(found):
        colour = style.BLUE if item.value > 0 else style.ORANGE
        if item.low <= 0.0 <= item.high:
            colour = style.GREY
        one = [np.array([value]) for value in (place, item.value, item.low, item.high)]
        style.dots_with_intervals(axes, *one, colour=colour)
        axes.annotate(
            weight_in_words(names[place], item),
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=colour,
            annotation_clip=False,
        )
    axes.axvline(0.0, color=style.GREY, linewidth=1.0)
    style.name_rows(axes, [readable(name) for name in names])
    axes.set_xlabel("weight of the normalised preference-model score")
    return figure


def scalarizer_accuracy(tables: RunTables) -> Figure | None:
    """Multi-objective accuracy per scalarizer beside the baselines, with ceiling and Bayes lines."""
    rows = tables.scalarizers
    shown = [row for row in rows if row["kind"] in ("scalarizer", "baseline")]
    if not shown:
        return None
    shown.sort(key=lambda row: (row["kind"] != "scalarizer", -number(row, "accuracy")))
    figure = style.new_figure(1.15 + 0.3 * len(shown))
    axes = figure.add_subplot()
    for kind, colour, marker, label in (
        ("scalarizer", style.BLUE, "o", "multi-objective"),
        ("baseline", style.ORANGE, "D", "single-objective"),
    ):
        places = np.array([place for place, row in enumerate(shown) if row["kind"] == kind])
        if not len(places):
            continue
        triples = np.array(
            [[number(shown[p], key) for key in ("accuracy", "low", "high")] for p in places]
        )
        style.dots_with_intervals(
            axes, places, *triples.T, colour=colour, marker=marker, label=label
        )
    style.name_rows(axes, [readable(str(row["name"])) for row in shown])
    style.reference_line(axes, 0.5, "chance")
    lines = {"ceiling": "ceiling\n(perfect PMs)", "bayes": "Bayes\n(label noise)"}
    known = [(str(row["kind"]), number(row, "accuracy")) for row in rows if row["kind"] in lines]
    for kind, value in known:
        style.reference_line(axes, value, "", colour=style.GREEN)
        side = 1 if value == max(entry[1] for entry in known) else -1
        axes.annotate(
            f"{lines[kind]} {value:.3f}",
            (value, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="bottom",
            fontsize=8,
            color=style.GREEN,
        )
    axes.set_xlabel("accuracy against the human label on held-out pairs")
    axes.legend(loc="lower right", bbox_to_anchor=(0.62, 1.0), ncols=2, borderaxespad=0.2)
    return figure


def ablation(tables: RunTables) -> Figure | None:
    """Accuracy while principles are removed (the paper's Figure 5b), and the loss of removing each one alone."""
    rows, single = tables.ablation, tables.drop_one
    if not rows:
        return None
    figure = style.new_figure(3.6)
    panels = figure.subplots(1, 2 if single else 1, squeeze=False).flatten()
    removed, value, low, high = np.array(
        [[number(row, key) for key in ("num_removed", "accuracy", "low", "high")] for row in rows]
    ).T
    left = panels[0]
    left.set_title("Removing principles in random order")
    left.fill_between(removed, low, high, color=style.BLUE, alpha=0.15, linewidth=0)
    left.plot(removed, value, "o-", color=style.BLUE, markersize=4.5, markeredgecolor="white")
    left.axhline(0.5, color=style.GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    left.grid(axis="y")
    left.set(xlabel="principles removed", ylabel="accuracy against the human label")
    if single:
        _losses(panels[1], sorted(single, key=lambda row: -number(row, "loss")))
    return figure


def _losses(axes: Axes, ranked: list[Row]) -> None:
    loss = np.array([100 * number(row, "loss") for row in ranked])
    colours = [style.BLUE if value > 0 else style.GREY for value in loss]
    axes.set_title("Removing one principle")
    axes.barh(np.arange(len(loss)), loss, color=colours, height=0.62)
    axes.axvline(0.0, color=style.GREY, linewidth=1.0)
    style.name_rows(axes, [readable(str(row["principle"])) for row in ranked])
    axes.set_xlabel("accuracy lost (points)")


def sweep(tables: RunTables) -> Figure | None:
    """Accuracy of every draw of the offline sweep by scalarizer, and over each scalarizer's own parameter."""
    rows = tables.sweep_offline
    if not rows:
        return None
    names = list(dict.fromkeys(str(row["scalarizer"]) for row in rows))
    tuned = [
        name
        for name in names
        if any(row["scalarizer"] == name and row["parameter"] for row in rows)
    ]
    figure = style.new_figure(1.0 + 0.36 * len(names) + (2.3 if tuned else 0.0))
    layout = [["draws"] * len(tuned), tuned] if tuned else [["draws"]]
    heights = [0.36 * len(names) + 0.6, 2.0] if tuned else [1.0]
    panels: dict[str, Axes] = figure.subplot_mosaic(layout, height_ratios=heights)
    _draws(panels["draws"], tables, names)
    for name in tuned:
        own = [row for row in rows if row["scalarizer"] == name and row["parameter"]]
        axes = panels[name]
        axes.scatter(
            [number(row, "value") for row in own],
            [number(row, "accuracy") for row in own],
            s=13,
            color=style.BLUE,
            alpha=0.55,
            linewidths=0,
        )
        axes.set_title(readable(name), fontsize=9.5, pad=4)
        axes.set_xlabel(str(own[0]["parameter"]))
        if own[0]["parameter"] == "temperature":
            axes.set_xscale("log")  # drawn over orders of magnitude
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.grid(axis="y")
        axes.locator_params(axis="y", nbins=5)
    if tuned:
        panels[tuned[0]].set_ylabel("accuracy")
    return figure


def _draws(axes: Axes, tables: RunTables, names: list[str]) -> None:
    jitter = np.random.default_rng(derive_seed("sweep_jitter"))
    fitted = {str(row["name"]): number(row, "accuracy") for row in tables.scalarizers}
    for place, name in enumerate(names):
        values = [number(r, "accuracy") for r in tables.sweep_offline if r["scalarizer"] == name]
        height = place + jitter.uniform(-0.22, 0.22, len(values))
        axes.scatter(values, height, s=13, color=style.BLUE, alpha=0.45, linewidths=0, zorder=2)
    axes.plot(
        [fitted.get(name, np.nan) for name in names],
        range(len(names)),
        "D",
        color=style.ORANGE,
        markersize=6.5,
        markeredgecolor="white",
        label="fitted weights, the run's parameters",
        zorder=3,
    )
    axes.plot(
        [],
        [],
        "o",
        color=style.BLUE,
        alpha=0.6,
        markersize=4,
        label="one draw of weights and parameter",
    )
    style.name_rows(axes, [readable(name) for name in names])
    axes.set_xlabel("accuracy against the human label on cached scores")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
