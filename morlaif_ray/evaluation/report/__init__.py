"""The report of a run: `build_report(run_dir, evaluation_dir, output_dir)`, from files only.

    run folder -> RunTables -> claims, figures -> sections -> report.html, figures/*.png, tables/*.csv, gates.json

The same files give the same bytes. An input that is missing becomes a sentence on the page; a damaged one an error.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from morlaif_ray.artifacts import explain_os_errors, write_csv, write_json
from morlaif_ray.evaluation.claims import all_gates
from morlaif_ray.evaluation.report import (
    feedback,
    learning,
    overview,
    page,
    paper,
    policy,
    reward,
)
from morlaif_ray.evaluation.report.blocks import Section, Table
from morlaif_ray.evaluation.run_tables import RunTables, read_run
from morlaif_ray.types import GateReport

REPORT_FILE = "report.html"

SECTIONS = (
    learning.data_section,
    feedback.feedback_section,
    learning.preference_section,
    reward.reward_section,
    paper.paper_section,
    policy.policy_section,
    policy.win_section,
    policy.sample_section,
    reward.sweep_section,
)
"""In the order of the pipeline; the sweep comes last because nothing depends on it."""


def build_report(run_dir: Path, evaluation_dir: Path, output_dir: Path) -> Path:
    """Writes the report into `output_dir` and returns the path of the page.

    `run_dir` holds stages 0 to 5 and config.yaml; `evaluation_dir` holds the evaluation's own files (it may be the
    temporary folder of a stage that is being published) and may be `output_dir` itself.
    """
    from morlaif_ray.evaluation.figures import draw_figures  # matplotlib: only where it draws

    tables = read_run(run_dir, evaluation_dir)
    gates = all_gates(tables)
    figures = draw_figures(tables)
    sections = [make(tables, figures) for make in SECTIONS]
    html = _page(tables, gates, sections)
    with explain_os_errors(output_dir):
        (output_dir / "figures").mkdir(parents=True, exist_ok=True)
        (output_dir / "tables").mkdir(exist_ok=True)
        for name, png in figures.items():
            (output_dir / "figures" / f"{name}.png").write_bytes(png)
        for block in (block for section in sections for block in section.blocks):
            if isinstance(block, Table):
                write_csv(output_dir / "tables" / f"{block.name}.csv", block.csv_rows)
        write_json(output_dir / "gates.json", [dataclasses.asdict(gate) for gate in gates])
        path = output_dir / REPORT_FILE
        path.write_text(html, encoding="utf-8")
    return path


def _page(tables: RunTables, gates: list[GateReport], sections: list[Section]) -> str:
    config = tables.config
    return page.render(
        {
            "run_name": config.name if config is not None else tables.run_dir.name,
            "description": config.description if config is not None else "",
            "on_testbed": config is not None and config.on_testbed,
            "seed": str(config.seed) if config is not None else "-",
            "summary": overview.summary(tables, gates),
            "tiles": overview.tiles(tables),
            "claims": overview.claims(gates),
            "sections": sections,
            "stages": overview.stage_lines(tables),
            "versions": overview.versions(),
            "missing": tables.missing,
            "config_text": overview.config_text(tables),
        }
    )


__all__ = ["REPORT_FILE", "build_report"]
