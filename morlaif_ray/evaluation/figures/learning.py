"""Figures of SFT and preference models: losses, accuracy per principle."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from morlaif_ray.evaluation.figures import style
from morlaif_ray.evaluation.run_tables import Row, RunTables, number, readable
from morlaif_ray.types import FloatArray


def sft_training(tables: RunTables) -> Figure | None:
    """Training loss of the target model over steps."""
    rows = tables.sft_training
    if not rows:
        return None
    figure = style.new_figure(2.7)
    axes = figure.add_subplot()
    steps, loss = _column(rows, "step"), _column(rows, "loss")
    axes.plot(steps, loss, color=style.SKY, linewidth=1.0, alpha=0.7)
    axes.plot(steps, style.running_mean(loss, 5), color=style.BLUE, label="training loss")
    heldout = number(tables.sft_metrics, "heldout_loss")
    if not np.isnan(heldout):
        axes.axhline(heldout, color=style.GREY, linestyle=(0, (4, 3)), linewidth=1.1)
        axes.annotate(
            f"held-out loss after training: {heldout:.3f}",
            (1.0, heldout),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 5),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=style.GREY,
        )
    axes.set(xlabel="SFT step", ylabel="loss (nats per token)")
    axes.set_ylim(bottom=0.0)
    axes.grid(axis="y")
    return figure


def pm_accuracy(tables: RunTables) -> Figure | None:
    """Accuracy of every PM on the test split, against its judge's label and against the human label."""
    rows = tables.pm_accuracy
    if not rows:
        return None
    models = list(dict.fromkeys((str(row["kind"]), str(row["model"])) for row in rows))
    models.sort(key=lambda entry: entry[0] != "principle")
    figure = style.new_figure(1.1 + 0.28 * len(models))
    axes = figure.add_subplot()
    for label, colour, marker, shift in (
        ("judge", style.BLUE, "o", -0.13),  # its own judge
        ("human", style.AMBER, "D", 0.13),
    ):
        found = {
            (str(row["kind"]), str(row["model"])): row for row in rows if row["label"] == label
        }
        triples = np.array(
            [
                [number(found.get(model, {}), key) for key in ("accuracy", "low", "high")]
                for model in models
            ]
        )
        style.dots_with_intervals(
            axes,
            np.arange(len(models), dtype=np.float64) + shift,
            triples[:, 0],
            triples[:, 1],
            triples[:, 2],
            colour=colour,
            marker=marker,
            size=6.5 if marker == "o" else 5.5,
            label="against its judge's label" if label == "judge" else "against the human label",
        )
    principles = sum(kind == "principle" for kind, _ in models)
    if 0 < principles < len(models):
        axes.axhline(principles - 0.5, color=style.GREY, linewidth=0.8)
    style.name_rows(
        axes,
        [readable(name) + ("" if kind == "principle" else " *") for kind, name in models],
    )
    style.reference_line(axes, 0.5, "chance")
    axes.set_xlabel("accuracy on held-out pairs (* = single-objective baseline)")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
    return figure


def pm_training(tables: RunTables) -> Figure | None:
    """Training loss of every PM, one small panel each."""
    rows = tables.pm_training
    if not rows:
        return None
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    figure, panels = style.small_panels(len(models), columns=4, base_in=0.6, row_in=1.35)
    for axes, name in zip(panels, models, strict=True):
        own = [row for row in rows if row["model"] == name]
        colour = style.ORANGE if name.startswith("baseline_") else style.BLUE
        loss = _column(own, "loss")
        axes.plot(_column(own, "step"), loss, color=colour, alpha=0.3, linewidth=0.9)
        axes.plot(_column(own, "step"), style.running_mean(loss, 5), color=colour, linewidth=1.5)
        axes.set_title(readable(name.removeprefix("baseline_")), fontsize=9, pad=3)
        axes.grid(axis="y")
        axes.locator_params(nbins=4)
    figure.supxlabel("training step", fontsize=9.5)
    figure.supylabel("loss (nats per pair)", fontsize=9.5)
    return figure


def _column(rows: list[Row], key: str) -> FloatArray:
    return np.array([number(row, key) for row in rows], dtype=np.float64)
