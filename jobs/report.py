"""Job `report`: draws the report of a run again, from what its stages left on disk.

`6_evaluation` is published anew with the same data files and the new page, figures and tables; the old folder goes to
`superseded/`. Where the new report has the same bytes nothing is published. `<run>/report.html` is a copy for people.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from jobs.context import JobContext
from morlaif_ray.artifacts import MANIFEST, StageFolder, explain_os_errors, read_manifest
from morlaif_ray.errors import ArtifactError
from morlaif_ray.evaluation import REPORT_FILE, build_report

STAGE = "6_evaluation"


def run(context: JobContext) -> None:
    published = context.path(STAGE)
    manifest = read_manifest(published)
    if manifest is None:
        raise ArtifactError(f"{published}: not published yet; run 'morlaif evaluate' first")
    with (
        explain_os_errors(context.run_dir),
        tempfile.TemporaryDirectory(prefix=".report.", dir=context.run_dir) as drawn_name,
    ):
        drawn = Path(drawn_name)
        build_report(context.run_dir, published, drawn)
        if _same_files(drawn, published):
            context.reporter.line("report: unchanged")
        else:
            # The recipe stays: the same evaluation, shown anew.
            stage = StageFolder(
                context.run_dir,
                STAGE,
                config_part=manifest.config,
                inputs=manifest.inputs,
                seed=manifest.seed,
            )
            with stage.writing(dict(manifest.rows)) as folder:
                _copy_data(published, folder)
                shutil.copytree(drawn, folder, dirs_exist_ok=True)
    context.reporter.line(f"report: {copy_page(context.run_dir)}")


def copy_page(run_dir: Path) -> Path:
    """Copies the published page to `<run>/report.html`, whole or not at all, and returns that path."""
    target = run_dir / REPORT_FILE
    temporary = run_dir / f".{REPORT_FILE}.partial"
    with explain_os_errors(target):
        shutil.copyfile(run_dir / STAGE / REPORT_FILE, temporary)
        temporary.replace(target)
    return target


def _copy_data(published: Path, folder: Path) -> None:
    """The evaluation's own files; manifest, page, figures and tables are made anew."""
    for path in sorted(published.iterdir()):
        if path.is_file() and path.name not in (MANIFEST, REPORT_FILE):
            shutil.copyfile(path, folder / path.name)


def _same_files(drawn: Path, published: Path) -> bool:
    """True where every drawn file stands in the stage with the same bytes, and the stage shows no other."""
    new = {path.relative_to(drawn) for path in drawn.rglob("*") if path.is_file()}
    shown = {
        path.relative_to(published)
        for folder in ("figures", "tables")
        for path in (published / folder).glob("*")
    }
    return shown <= new and all(
        (published / name).is_file()
        and (published / name).read_bytes() == (drawn / name).read_bytes()
        for name in new
    )
