"""Results of `benchmarks.active_selection`: intervals over seeds, the curve, the JSON figures, the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from morlaif_ray.testbed import PRINCIPLES

RANDOM, ACTIVE = "random", "ensemble_disagreement"
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, 97.5%, by degrees of freedom; the normal value beyond."""


@dataclass(frozen=True)
class Settings:
    """What a seed's worker needs to know. Picklable."""

    backbone: str
    sizes: tuple[int, ...]
    pool: int
    test: int
    ensemble: int
    min_steps: int
    learning_rate: float
    noise: float


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's t over independent seeds; no ends for a single one."""
    num, mean = len(values), math.fsum(values) / len(values)
    if num < 2:
        return mean, math.nan, math.nan
    half = T_975.get(num - 1, 1.96) * float(np.std(values, ddof=1)) / math.sqrt(num)
    return mean, mean - half, mean + half


def curve_rows(
    accuracy: Sequence[dict[str, list[list[float]]]], sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of `learning_curve.csv` from accuracy[seed][strategy][size][principle]."""
    rows = []
    for strategy in (RANDOM, ACTIVE):
        for number, size in enumerate(sizes):
            own = [float(np.mean(seed[strategy][number])) for seed in accuracy]
            other = [float(np.mean(seed[RANDOM][number])) for seed in accuracy]
            mean, low, high = t_interval(own)
            gain = t_interval([a - b for a, b in zip(own, other, strict=True)])
            if strategy == RANDOM:
                gain = (math.nan, math.nan, math.nan)
            rows.append(
                {
                    "strategy": strategy,
                    "num_pairs": size,
                    "num_judgements": size * len(PRINCIPLES),
                    "accuracy": mean,
                    "low": low,
                    "high": high,
                    "difference": gain[0],
                    "difference_low": gain[1],
                    "difference_high": gain[2],
                    "num_seeds": len(accuracy),
                }
            )
    return rows


def summary(
    rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], settings: Settings
) -> dict[str, Any]:
    """The JSON figures. `gain_mean`: active minus random, averaged over the sizes after the seed set."""
    gains = [
        float(
            np.mean(
                [
                    np.mean(seed["accuracy"][ACTIVE][number])
                    - np.mean(seed["accuracy"][RANDOM][number])
                    for number in range(1, len(settings.sizes))
                ]
            )
        )
        for seed in results
    ]
    mean, low, high = t_interval(gains)
    return {
        "sizes": list(settings.sizes),
        **{
            f"accuracy_{strategy}": [
                round(row["accuracy"], 4) for row in rows if row["strategy"] == strategy
            ]
            for strategy in (RANDOM, ACTIVE)
        },
        "gain_mean": round(mean, 4),
        "gain_low": None if math.isnan(low) else round(low, 4),
        "gain_high": None if math.isnan(high) else round(high, 4),
        "num_seeds": len(results),
        "variance_ratio_chosen": round(
            float(np.mean([seed["variance_ratio"] for seed in results])), 2
        ),
        "mean_abs_log_odds": {
            name: round(float(np.mean([seed["mean_abs_log_odds"][name] for seed in results])), 3)
            for name in (RANDOM, ACTIVE)
        },
    }


def write_document(
    path: Path,
    rows: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    settings: Settings,
    backbone: str,
) -> None:
    """The figures as Markdown, with the curve as PNG beside it."""
    from morlaif_ray.evaluation.figures import feedback, style
    from morlaif_ray.evaluation.run_tables import RunTables

    picture = path.with_suffix(".png")
    with style.report_style():
        tables = RunTables(path.parent, None, {}, (), learning_curve=list(rows))
        figure = feedback.learning_curve(tables)
        assert figure is not None
        picture.write_bytes(style.to_png(figure))
    figures = summary(rows, results, settings)
    path.write_text(
        page(rows, results, settings, figures, picture.name, backbone), encoding="utf-8"
    )


def page(
    rows: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    settings: Settings,
    figures: dict[str, Any],
    picture: str,
    backbone: str,
) -> str:
    by_place = {(row["strategy"], row["num_pairs"]): row for row in rows}
    lines = [
        "# Active selection against random pairs",
        "",
        "Written by `python -m benchmarks.active_selection --document docs/benchmarks-active-selection.md`. "
        "Do not edit by hand.",
        "",
        f"Test-bed, {settings.pool:,} pairs to choose from, {settings.test:,} held-out pairs, {len(results)} seeds; "
        f"{backbone}, one trunk with {len(PRINCIPLES)} heads, at least {settings.min_steps} optimizer steps per model; "
        f"ensemble of {settings.ensemble} members (heads on one trunk, bootstrap masks); judge noise {settings.noise} "
        "nats. Accuracy: mean over principles, on the sign of the noise-free truth. Intervals: 95%, Student's t over "
        "seeds.",
        "",
        "| judged pairs | random | ensemble disagreement | difference (paired) |",
        "| --- | --- | --- | --- |",
    ]
    for size in settings.sizes:
        random, active = by_place[RANDOM, size], by_place[ACTIVE, size]
        gain = (
            "same pairs"
            if size == settings.sizes[0]
            else f"{active['difference']:+.4f} "
            f"[{active['difference_low']:+.4f}, {active['difference_high']:+.4f}]"
        )
        lines.append(f"| {size:,} | {_shown(random)} | {_shown(active)} | {gain} |")
    lines += [
        "",
        f"Mean difference over the sizes after the seed set: {figures['gain_mean']:+.4f} "
        f"[{figures['gain_low']}, {figures['gain_high']}]: {_verdict(figures)}. The ensemble's variance on the chosen "
        f"pairs is {figures['variance_ratio_chosen']} times that of the pool; their mean |log-odds| is "
        f"{figures['mean_abs_log_odds'][ACTIVE]} nats (random: {figures['mean_abs_log_odds'][RANDOM]}).",
        "",
        f"![accuracy over judged pairs]({picture})",
        "",
        f"At {settings.sizes[-1]:,} pairs, by principle (mean over seeds):",
        "",
        "| principle | random | ensemble disagreement | difference |",
        "| --- | --- | --- | --- |",
    ]
    for column, name in enumerate(PRINCIPLES):
        one, two = (
            float(np.mean([seed["accuracy"][strategy][-1][column] for seed in results]))
            for strategy in (RANDOM, ACTIVE)
        )
        lines.append(f"| {name} | {one:.3f} | {two:.3f} | {two - one:+.3f} |")
    return "\n".join(lines) + "\n"


def _shown(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"


def _verdict(figures: dict[str, Any]) -> str:
    if figures["gain_low"] is None or figures["gain_low"] <= 0.0 <= figures["gain_high"]:
        return "no difference can be told from these seeds"
    better = figures["gain_mean"] > 0.0
    return "active selection is better" if better else "random selection is better"
