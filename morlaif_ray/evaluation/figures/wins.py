"""Figures of win rates: against SFT, against the single-PM policy, and all policies against each other."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from morlaif_ray.evaluation.figures import style
from morlaif_ray.evaluation.run_tables import Row, RunTables, number, readable


def win_rates(tables: RunTables) -> Figure | None:
    """Wins, ties and losses as bars, the win rate with its interval on top; one panel per opponent."""
    baseline = tables.baseline_arm
    opponents = ["sft"] + ([baseline.name] if baseline is not None else [])
    panels = [(name, _against(tables, name)) for name in opponents]
    panels = [(name, rows) for name, rows in panels if rows]
    if not panels:
        return None
    sizes = [len(rows) for _, rows in panels]
    figure = style.new_figure(1.0 + sum(0.55 + 0.33 * size for size in sizes))
    grid = figure.subplots(
        len(panels), 1, squeeze=False, sharex=True, height_ratios=[s + 1 for s in sizes]
    )
    for axes, (opponent, rows) in zip(grid.flat, panels, strict=True):
        _stacked(axes, rows)
        axes.set_title(f"Against {readable(opponent)}")
    grid.flat[-1].set_xlabel("share of prompts; dot: win rate (ties half) with 95% interval")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4)
    return figure


def win_rate_matrix(tables: RunTables) -> Figure | None:
    """Win rate of the row's policy against the column's; blank where the two were not compared."""
    named = {row[key] for row in tables.win_rates for key in ("policy", "opponent")}
    order = [arm.name for arm in tables.arms] + ["sft"]
    names = [name for name in order if name in named] + sorted(named - set(order))
    if len(names) < 3:
        return None  # one comparison is a bar, not a matrix
    values = np.array(
        [[number(tables.win_row(one, two), "win_rate") for two in names] for one in names]
    )
    np.fill_diagonal(values, np.nan)
    if np.isnan(values).all():
        return None
    figure = style.new_figure(1.5 + 0.4 * len(names))
    axes = figure.add_subplot()
    shown = [readable(name) for name in names]
    reach = max(0.2, float(np.nanmax(np.abs(values - 0.5))))
    style.matrix(axes, values, shown, shown, low=0.5 - reach, high=0.5 + reach)
    axes.set_title("Win rate of the row against the column")
    return figure


def _against(tables: RunTables, opponent: str) -> list[Row]:
    rows = [tables.win_row(arm.name, opponent) for arm in tables.arms if arm.name != opponent]
    return sorted(
        (row for row in rows if number(row, "num_prompts") > 0),
        key=lambda row: -number(row, "win_rate"),
    )


def _stacked(axes: Axes, rows: list[Row]) -> None:
    counts = np.array([[number(row, key) for key in ("wins", "ties", "losses")] for row in rows])
    shares = counts / counts.sum(axis=1, keepdims=True)
    left = np.zeros(len(rows))
    for part, colour, label in (
        (0, "#A9CDE6", "wins"),
        (1, "#ECEFF2", "ties"),
        (2, "#F3C6A5", "losses"),
    ):
        axes.barh(
            np.arange(len(rows)), shares[:, part], left=left, height=0.66, color=colour, label=label
        )
        left += shares[:, part]
    triples = np.array([[number(row, key) for key in ("win_rate", "low", "high")] for row in rows])
    places = np.arange(len(rows))
    axes.hlines(places, triples[:, 1], triples[:, 2], color=style.INK, linewidth=1.8, zorder=3)
    axes.plot(
        triples[:, 0],
        places,
        "o",
        color=style.INK,
        markersize=6,
        markeredgecolor="white",
        zorder=4,
        label="win rate",
    )
    for place, value in enumerate(triples[:, 0]):
        axes.annotate(
            f"{value:.2f}",
            (1.0, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )
    axes.axvline(0.5, color=style.INK, linewidth=1.0, linestyle=(0, (4, 3)))
    style.name_rows(axes, [readable(str(row["policy"])) for row in rows])
    axes.set_xlim(0.0, 1.0)
    axes.grid(visible=False)
