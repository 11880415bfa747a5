"""One look for all figures: colours that survive colour blindness and grey print, quiet axes, text readable at 800 px.

Contract: `new_figure` gives a white `Figure` on the Agg canvas (no pyplot, no global state), `to_png` its bytes, which
are the same for the same data. Colours have one meaning throughout: blue multi-objective, orange single-objective,
green the truth or a ceiling, grey SFT and reference lines.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from morlaif_ray.types import FloatArray

# Okabe and Ito's palette, told apart under every common colour blindness.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
SKY, AMBER, PINK = "#56B4E9", "#E69F00", "#CC79A7"
INK, GREY, PALE = "#22262B", "#7A828C", "#E3E7EB"
ARM_COLOURS = (BLUE, AMBER, GREEN, PINK, SKY, "#5B4B8A", "#8C6D1F")
ARM_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 1.5)), (0, (1, 1)))

DIVERGING = LinearSegmentedColormap.from_list(
    "orange_blue", ["#B24A00", "#EDA772", "#F7F7F5", "#7FB3D9", "#005A8F"]
)
SEQUENTIAL = LinearSegmentedColormap.from_list("pale_blue", ["#F7F9FB", "#9CC4E0", "#005A8F"])

WIDTH_IN = 8.2
DPI = 140
_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#B4BBC3",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def report_style() -> Iterator[None]:
    """Draws what is inside in the report's look, and leaves the process's settings as they were."""
    with mpl.rc_context(_RC):
        yield


def new_figure(height_in: float, width_in: float = WIDTH_IN) -> Figure:
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def small_panels(
    num: int, *, columns: int, base_in: float, row_in: float
) -> tuple[Figure, list[Axes]]:
    """A figure of `num` small charts on common axes, row by row, at most `columns` beside each other.

    Its height is `base_in` and `row_in` per row, inches; places beyond the last chart stay empty.
    """
    columns = min(columns, num)
    rows = -(-num // columns)
    figure = new_figure(base_in + row_in * rows)
    places = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in places[num:]:
        axes.set_visible(False)
    return figure, list(places[:num])


def to_png(figure: Figure) -> bytes:
    """PNG bytes without time stamp."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def dots_with_intervals(
    axes: Axes,
    positions: FloatArray,
    values: FloatArray,
    lows: FloatArray,
    highs: FloatArray,
    *,
    colour: str,
    label: str | None = None,
    marker: str = "o",
    size: float = 6.0,
) -> None:
    """Horizontal point estimates with interval bars; NaN rows are left empty."""
    shown = ~np.isnan(values)
    low = np.where(np.isnan(lows), values, lows)[shown]
    high = np.where(np.isnan(highs), values, highs)[shown]
    axes.hlines(positions[shown], low, high, color=colour, linewidth=2.0, alpha=0.55, zorder=2)
    axes.plot(
        values[shown],
        positions[shown],
        marker,
        color=colour,
        markersize=size,
        markeredgecolor="white",
        markeredgewidth=0.8,
        label=label,
        zorder=3,
    )


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names the rows of a horizontal chart, first row on top, with faint guide lines."""
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.hlines(
        range(len(names)),
        0,
        1,
        transform=axes.get_yaxis_transform(),
        color=PALE,
        linewidth=0.6,
        zorder=0,
    )
    axes.spines["left"].set_visible(False)


def reference_line(axes: Axes, value: float, text: str, *, colour: str = GREY) -> None:
    """A dashed vertical line with its name above the chart."""
    axes.axvline(value, color=colour, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        text,
        (value, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8,
        color=colour,
    )


def matrix(
    axes: Axes,
    values: FloatArray,
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    low: float,
    high: float,
    colours: LinearSegmentedColormap = DIVERGING,
    number_format: str = "{:.2f}",
) -> None:
    """A heat map with its numbers in the cells; NaN cells are blank."""
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(column_names)), list(column_names), rotation=40, ha="right")
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(row_names)), list(row_names))
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        place = (value - low) / (high - low)
        dark = place < 0.12 or place > 0.88 if colours is DIVERGING else place > 0.65
        axes.text(
            column,
            row,
            number_format.format(value),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else INK,
        )


def running_mean(values: FloatArray, window: int) -> FloatArray:
    """Centred running mean over the present values of `window` steps, shorter at the ends."""
    present = (~np.isnan(values)).astype(float)
    kernel = np.ones(min(window, max(1, len(values))))
    total = np.convolve(np.nan_to_num(values), kernel, mode="same")
    count = np.convolve(present, kernel, mode="same")
    means = np.full(len(values), np.nan)
    np.divide(total, count, out=means, where=count > 0)
    return means
