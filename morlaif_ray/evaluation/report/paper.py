"""The run's accuracies in the arrangement of the paper's Figures 2a and 2b (Williams 2024, arXiv 2406.07295).

Contract: the paper's side is words. Both figures are drawings, and no text or data file with their values was found;
none is guessed from the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from morlaif_ray.config import Config
from morlaif_ray.evaluation.report.blocks import NAME, Column, Section
from morlaif_ray.evaluation.run_tables import Row, RunTables

NOT_AT_HAND = "drawn, values not at hand"
PRINCIPLES, OBJECTIVES = "2a", "2b"


def paper_section(tables: RunTables, figures: dict[str, bytes]) -> Section:
    section = Section(
        "paper",
        "Beside the paper's Figures 2a and 2b",
        "2a: how well each principle's preference model and the single-objective ones predict their own judge. 2b: how "
        "often each scalarizer and each single-objective model agrees with the human label. Both on held-out pairs.",
        tables,
        figures,
    )
    rows = [*_principles(tables), *_objectives(tables)]
    if not rows:
        section.notice(
            "Stages 3_preference_models and 4_reward have not run: there is nothing to compare."
        )
        return section
    section.text(
        "The paper (Williams 2024, arXiv 2406.07295) shows both as drawings, for its own models, data and judge. The "
        "values behind them are not at hand: its repository holds the drawings as images. In that repository's words, "
        "models of individual principles are generally much more accurate than single-objective ones (2a), and all "
        "multi-objective rewards outperform the single-model baselines (2b)."
    )
    section.table("paper_figure_2", "Ours and the paper's, by model", _COLUMNS, rows)
    return section


def _principles(tables: RunTables) -> Iterator[Row]:
    for row in tables.pm_accuracy:
        if row["label"] == "judge":
            yield _row(PRINCIPLES, tables, row, str(row["model"]))


def _objectives(tables: RunTables) -> Iterator[Row]:
    for row in tables.scalarizers:
        if row["kind"] in ("scalarizer", "baseline"):
            yield _row(OBJECTIVES, tables, row, str(row["name"]))


def _row(figure: str, tables: RunTables, row: Row, what: str) -> Row:
    return {
        "figure": figure,
        "what": what,
        "kind": row["kind"],
        "model": "" if tables.config is None else model_in_words(tables.config),
        "accuracy": row["accuracy"],
        "low": row["low"],
        "high": row["high"],
        "num": row["num"],
        "paper": NOT_AT_HAND,
    }


def model_in_words(config: Config) -> str:
    """The preference models of a run: their backbone's name (a folder's last part), topology, and LoRA."""
    own, target = config.preference, config.model
    if own.backbone is not None:
        name = _name(own.backbone)
    elif target.kind == "scratch":
        name = f"GPT-2 of {target.num_layers} x {target.width}, trained on the spot"
    else:
        name = _name(target.path)
    topology = own.topology.replace("_", " ")
    return f"{name}; {topology}" + (", LoRA" if own.lora is not None else "")


def _name(path: str) -> str:
    """A hub id as it is, of a folder the last part alone: a report tells nothing of its machine."""
    parts = PurePath(path).parts
    return path if len(parts) <= 2 and not path.startswith((".", "/", "~")) else parts[-1]


_COLUMNS = (
    Column("figure", "Figure"),
    Column("what", "Principle or reward", NAME),
    Column("kind", "Kind"),
    Column("model", "Preference models"),
    Column("accuracy", "Ours", "{:.3f}", ("low", "high")),
    Column("num", "Pairs", "{:,.0f}"),
    Column("paper", "The paper's"),
)
