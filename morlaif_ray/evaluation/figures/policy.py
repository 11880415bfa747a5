"""Figures of PPO: training curves, the truth beside the reward, scores per principle, reward against KL.

Rewards of different arms are different functions; each is shown in SFT standard deviations of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from morlaif_ray.evaluation.figures import style
from morlaif_ray.evaluation.run_tables import ArmTables, RunTables, floats, number, readable
from morlaif_ray.types import FloatArray

SMOOTHING_STEPS = 7


def training_curves(tables: RunTables) -> Figure | None:
    """Reward, KL, length, and where the truth is known oracle utility and well-formedness, all arms in each panel."""
    arms = _with_metrics(tables)
    if not arms:
        return None
    panels: list[tuple[str, Callable[[ArmTables], FloatArray]]] = [
        ("reward gain (SFT sd)", lambda arm: arm.gain_series),
        ("KL to SFT (nats per response)", lambda arm: arm.series("kl_mean")),
        ("response length (tokens)", lambda arm: arm.series("response_length_mean")),
        ("oracle utility (truth)", lambda arm: arm.series("oracle_utility")),
        ("well-formed share (truth)", lambda arm: arm.series("well_formed_share")),
    ]
    panels = [
        (title, read)
        for title, read in panels
        if any(not np.isnan(read(arm)).all() for arm in arms)
    ]
    if not panels:
        return None
    rows = -(-len(panels) // 3)
    figure = style.new_figure(0.3 + 2.35 * rows)
    grid = figure.subplots(rows, 3, squeeze=False).flatten()
    for axes, (title, read) in zip(grid, panels, strict=False):
        for place, arm in enumerate(arms):
            _curve(axes, arm.series("step"), read(arm), place, arm)
        axes.set_title(title, fontsize=9.5, pad=5)
        axes.grid(axis="y")
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("PPO step", fontsize=8.5)
        if title.startswith("KL"):
            _target_line(axes, tables)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    if len(panels) < len(grid):
        spare = grid[len(panels)]
        spare.legend(
            handles,
            labels,
            loc="center left",
            title="policy (its reward)",
            fontsize=8.5,
            title_fontsize=8.5,
            alignment="left",
            handlelength=2.6,
        )
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def _target_line(axes: Axes, tables: RunTables) -> None:
    """The KL that the adaptive controller steers to."""
    if tables.config is None or not tables.config.policy.adaptive_kl:
        return
    target = tables.config.policy.kl_target
    axes.axhline(target, color=style.GREY, linestyle=(0, (4, 3)), linewidth=1.1)
    axes.annotate(
        "target",
        (0.0, target),
        xycoords=("axes fraction", "data"),
        xytext=(3, -11),
        textcoords="offset points",
        fontsize=8,
        color=style.GREY,
    )


def reward_and_truth(tables: RunTables) -> Figure | None:
    """Per arm: the PMs' reward and the true utility in SFT standard deviations; a gap that opens is reward hacking."""
    scale = _oracle_scale(tables)
    arms = [
        arm for arm in _with_metrics(tables) if not np.isnan(arm.series("oracle_utility")).all()
    ]
    if scale is None or not arms:
        return None
    figure, panels = style.small_panels(len(arms), columns=4, base_in=0.75, row_in=1.75)
    for axes, arm in zip(panels, arms, strict=True):
        steps = arm.series("step")
        reward = style.running_mean(arm.gain_series, SMOOTHING_STEPS)
        truth = style.running_mean(
            (arm.series("oracle_utility") - scale[0]) / scale[1], SMOOTHING_STEPS
        )
        axes.fill_between(
            steps,
            truth,
            reward,
            where=(reward > truth).tolist(),
            color=style.ORANGE,
            alpha=0.1,
            linewidth=0,
        )
        axes.plot(steps, reward, color=style.BLUE, label="reward of the preference models")
        axes.plot(
            steps, truth, color=style.GREEN, linestyle=(0, (5, 1.5)), label="oracle utility (truth)"
        )
        axes.axhline(0.0, color=style.GREY, linewidth=0.8)
        axes.set_title(readable(arm.name), fontsize=9.5, pad=4)
        formed = number(tables.policy(arm.name), "well_formed_share")
        if not np.isnan(formed):
            axes.annotate(
                f"well-formed {formed:.0%}",
                (0.04, 0.95),
                xycoords="axes fraction",
                va="top",
                fontsize=8,
                color=style.INK if formed > 0.9 else style.ORANGE,
            )
        axes.grid(axis="y")
        axes.locator_params(nbins=4)
    figure.supxlabel("PPO step", fontsize=9.5)
    figure.supylabel("gain over SFT (SFT sd)", fontsize=9.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def principle_scores(tables: RunTables) -> Figure | None:
    """Mean normalised score of every principle over PPO steps, one heat map per arm."""
    names = tables.principles
    arms = [arm for arm in _with_metrics(tables) if any(f"norm_{n}" in arm.metrics for n in names)]
    if not arms or not names:
        return None
    grids = [np.array([arm.series(f"norm_{name}") for name in names]) for arm in arms]
    present = np.concatenate([values[~np.isnan(values)] for values in grids])
    reach = max(0.5, float(np.percentile(np.abs(present), 99))) if len(present) else 0.5
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure = style.new_figure(0.6 + (0.45 + 0.155 * len(names)) * rows)
    axes_grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    image = None
    for axes, arm, values in zip(axes_grid.flat, arms, grids, strict=False):
        steps = arm.series("step")
        image = axes.imshow(
            values,
            aspect="auto",
            cmap=style.DIVERGING,
            vmin=-reach,
            vmax=reach,
            interpolation="nearest",
            extent=(steps[0] - 0.5, steps[-1] + 0.5, len(names) - 0.5, -0.5),
        )
        axes.set_title(readable(arm.name), fontsize=9.5, pad=4)
        axes.set_yticks(range(len(names)), [readable(name) for name in names], fontsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.spines[:].set_visible(False)
    for axes in list(axes_grid.flat)[len(arms) :]:
        axes.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=axes_grid, shrink=0.7, aspect=28, pad=0.015)
    bar.set_label("mean score (SFT sd)", fontsize=8.5)
    bar.outline.set_visible(False)
    figure.supxlabel("PPO step", fontsize=9.5)
    return figure


def reward_vs_kl(tables: RunTables) -> Figure | None:
    """What each nat of KL bought: reward gain, and the true gain where it is known."""
    arms = _with_metrics(tables)
    if not arms:
        return None
    scale = _oracle_scale(tables)
    with_truth = scale is not None and any(
        not np.isnan(a.series("oracle_utility")).all() for a in arms
    )
    figure = style.new_figure(3.5)
    panels = figure.subplots(
        1, 2 if with_truth else 1, sharex=True, sharey=True, squeeze=False
    ).flatten()
    for place, arm in enumerate(arms):
        kl = style.running_mean(arm.series("kl_mean"), SMOOTHING_STEPS)
        _path(panels[0], kl, arm.gain_series, place, arm)
        if with_truth and scale is not None:
            _path(panels[1], kl, (arm.series("oracle_utility") - scale[0]) / scale[1], place, arm)
    titles = ("Reward of the preference models", "Oracle utility (truth)")
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title)
        axes.set_xlabel("KL to SFT (nats per response)")
        axes.axhline(0.0, color=style.GREY, linewidth=0.8)
        axes.grid()
    panels[0].set_ylabel("gain over SFT (SFT sd)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(arms)), fontsize=8.5
    )
    return figure


def _with_metrics(tables: RunTables) -> list[ArmTables]:
    return [arm for arm in tables.arms if arm.metrics.get("step")]


def _line(place: int, arm: ArmTables) -> dict[str, Any]:
    """Baselines are dashed ink; arms take the palette in turn, dashed on its second round."""
    if arm.is_baseline:
        return {"color": style.INK, "linestyle": (0, (5, 1.5)), "label": arm.label}
    count = len(style.ARM_COLOURS)
    return {
        "color": style.ARM_COLOURS[place % count],
        "linestyle": style.ARM_DASHES[(place // count) % len(style.ARM_DASHES)],
        "label": arm.label,
    }


def _curve(axes: Axes, steps: FloatArray, values: FloatArray, place: int, arm: ArmTables) -> None:
    look = _line(place, arm)
    axes.plot(steps, values, color=str(look["color"]), alpha=0.13, linewidth=0.8)
    axes.plot(steps, style.running_mean(values, SMOOTHING_STEPS), linewidth=1.6, **look)


def _path(axes: Axes, kl: FloatArray, gain: FloatArray, place: int, arm: ArmTables) -> None:
    look = _line(place, arm)
    smooth = style.running_mean(gain, SMOOTHING_STEPS)
    axes.plot(kl, smooth, linewidth=1.5, **look)
    axes.plot(
        kl[-1:], smooth[-1:], "o", color=str(look["color"]), markersize=6, markeredgecolor="white"
    )


def _oracle_scale(tables: RunTables) -> tuple[float, float] | None:
    """Mean and standard deviation of SFT's oracle utility on the evaluation prompts; None where unknown."""
    column = tables.responses.get("oracle_utility")
    if column is None:
        return None
    values = floats(column, len(column))[np.array(tables.responses["policy"]) == "sft"]
    values = values[~np.isnan(values)]
    if len(values) < 2 or np.std(values) == 0.0:
        return None
    return float(np.mean(values)), float(np.std(values))
