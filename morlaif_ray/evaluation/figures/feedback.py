"""Figures of the judge: agreement and correlation of principles, position bias, calibration, learning curve."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from morlaif_ray.evaluation.figures import style
from morlaif_ray.evaluation.run_tables import Row, RunTables, number, readable
from morlaif_ray.types import FloatArray

STRATEGIES = {
    "random": ("random pairs", style.GREY, "s"),
    "ensemble_disagreement": ("where the ensemble disagrees", style.BLUE, "o"),
}


def agreement(tables: RunTables) -> Figure | None:
    """Share of pairs on which two principles prefer the same response (the paper's Figure 5a)."""
    return _matrix(
        tables.agreement, 0.5, "Share of pairs on which two principles prefer the same response"
    )


def correlation(tables: RunTables) -> Figure | None:
    """Pearson correlation of two principles' log-odds."""
    return _matrix(tables.correlation, 0.0, "Correlation of two principles' log-odds")


def position_bias(tables: RunTables) -> Figure | None:
    """Mean position bias of the judge per question, and how often the order decides its answer."""
    rows = tables.position_bias or _bias_of_summary(tables)
    bias = _column(rows, "mean")
    if not len(rows) or np.isnan(bias).all():
        return None
    names = [readable(str(row["principle"])) for row in rows]
    places = np.arange(len(rows), dtype=np.float64)
    shares = [_column(rows, f"order_dependent{end}") for end in ("", "_low", "_high")]
    figure = style.new_figure(0.9 + 0.25 * len(rows))
    if np.isnan(shares[0]).all():
        axes = figure.add_subplot()
    else:
        axes, right = figure.subplots(1, 2, width_ratios=(3, 2))
        style.dots_with_intervals(right, places, *shares, colour=style.AMBER)
        style.name_rows(right, [""] * len(rows))
        right.set_xlim(left=0.0)
        right.set_xlabel("share of labels that depend on the order")
    axes.hlines(places, 0.0, bias, color=style.BLUE, alpha=0.2, linewidth=2.0)
    lows, highs = _column(rows, "low"), _column(rows, "high")
    style.dots_with_intervals(axes, places, bias, lows, highs, colour=style.BLUE)
    axes.axvline(0.0, color=style.GREY, linewidth=1.0)
    style.name_rows(axes, names)
    reach = 1.15 * max(
        0.1, float(np.nanmax(np.abs([bias, np.nan_to_num(lows), np.nan_to_num(highs)])))
    )
    axes.set_xlim(-reach, reach)
    axes.set_xlabel(
        "\N{LEFTWARDS ARROW} for the second-given   mean bias (nats)   for the first-given \N{RIGHTWARDS ARROW}"
    )
    return figure


def calibration(tables: RunTables) -> Figure | None:
    """How often people agree with the judge, by how sure it is: one small panel per question, `general` first."""
    rows = tables.calibration
    if not rows:
        return None
    names = list(dict.fromkeys(str(row["principle"]) for row in rows))
    names.sort(key=lambda name: name != "general")
    figure, panels = style.small_panels(len(names), columns=5, base_in=0.7, row_in=1.6)
    for axes, name in zip(panels, names, strict=True):
        _reliability(axes, [row for row in rows if row["principle"] == name])
        axes.set_title(readable(name), fontsize=9, pad=3)
    figure.supxlabel("judge's probability for the response that it prefers", fontsize=9.5)
    figure.supylabel("share of people who prefer it", fontsize=9.5)
    return figure


def learning_curve(tables: RunTables) -> Figure | None:
    """PM accuracy against the number of judged pairs, active selection and random."""
    rows = tables.learning_curve
    if not rows:
        return None
    figure = style.new_figure(3.3)
    axes = figure.add_subplot()
    for strategy in dict.fromkeys(str(row["strategy"]) for row in rows):
        label, colour, marker = STRATEGIES.get(strategy, (readable(strategy), style.AMBER, "D"))
        own = [row for row in rows if row["strategy"] == strategy]
        pairs, accuracy = _column(own, "num_pairs"), _column(own, "accuracy")
        axes.fill_between(
            pairs, _column(own, "low"), _column(own, "high"), color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(pairs, accuracy, marker=marker, color=colour, label=label, markersize=5)
    axes.set_xscale("log", base=2)
    ticks = sorted({number(row, "num_pairs") for row in rows})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="judged pairs", ylabel="mean accuracy of the PMs")
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return figure


def _matrix(rows: list[Row], centre: float, title: str) -> Figure | None:
    if not rows:
        return None
    names = [str(row["principle"]) for row in rows]
    values = np.array([[number(row, name) for name in names] for row in rows])
    np.fill_diagonal(values, np.nan)  # 1 by definition: it would only draw the eye
    figure = style.new_figure(1.2 + 0.36 * len(names))
    axes = figure.add_subplot()
    shown = [readable(name) for name in names]
    spread = float(np.nanmax(np.abs(values - centre))) if not np.isnan(values).all() else 0.5
    reach = max(0.1, float(np.ceil(spread * 20)) / 20)
    style.matrix(axes, values, shown, shown, low=centre - reach, high=centre + reach)
    axes.set_title(title)
    return figure


def _reliability(axes: Axes, rows: list[Row]) -> None:
    axes.plot([0.5, 1.0], [0.5, 1.0], color=style.GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    confidence, share = _column(rows, "confidence"), _column(rows, "agreement")
    axes.vlines(
        confidence,
        _column(rows, "agreement_low"),
        _column(rows, "agreement_high"),
        color=style.BLUE,
        alpha=0.5,
        linewidth=1.6,
    )
    counts = _column(rows, "count")
    axes.scatter(
        confidence,
        share,
        s=6.0 + 50.0 * counts / counts.max(),
        color=style.BLUE,
        edgecolors="white",
        linewidths=0.6,
        zorder=3,
    )
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(0.0, 1.03)
    axes.set_xticks([0.5, 0.75, 1.0])
    axes.set_yticks([0.0, 0.5, 1.0])
    axes.grid(axis="y")


def _bias_of_summary(tables: RunTables) -> list[Row]:
    """The mean biases alone, of a run whose stage 2 wrote no table of them."""
    return [
        {"principle": name, "mean": number(row, "mean_position_bias")}
        for name, row in tables.asked.items()
    ]


def _column(rows: list[Row], key: str) -> FloatArray:
    return np.array([number(row, key) for row in rows], dtype=np.float64)
