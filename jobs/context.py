"""What every job gets: the config, the run folder, a reporter, and Ray on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.progress import Reporter
from morlaif_ray.artifacts import MANIFEST, STAGES, StageFolder, explain_os_errors
from morlaif_ray.config import Config
from morlaif_ray.config.root import OPERATIONAL_KEYS, OPERATIONAL_SECTIONS
from morlaif_ray.errors import ArtifactError

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class JobContext:
    config: Config
    run_dir: Path
    """Absolute: actors on the same file system read and write below it."""
    reporter: Reporter

    def stage(
        self,
        name: str,
        *,
        sections: Sequence[str],
        inputs: Sequence[str],
        extra: Mapping[str, Any] | None = None,
    ) -> StageFolder:
        """The stage `name`, which depends on these config sections and on these published stages."""
        plain = self.config.result_part()
        part: dict[str, Any] = {section: plain[section] for section in sections}
        part.update(extra or {})
        upstream = {
            entry: StageFolder(
                self.run_dir, entry, config_part={}, inputs={}, seed=self.config.seed
            ).content_hash()
            for entry in inputs
        }
        return StageFolder(
            self.run_dir, name, config_part=part, inputs=upstream, seed=self.config.seed
        )

    def connect(self) -> None:
        """Starts the local Ray or attaches to the configured one; does nothing when already connected."""
        from actors.session import connect

        connect(self.config.cluster, self.run_dir / "logs", self.reporter.line)

    def path(self, *parts: str) -> Path:
        return self.run_dir.joinpath(*parts)


def open_run(
    config: Config, run_dir: Path, reporter: Reporter, *, accept_config_change: bool = False
) -> JobContext:
    """Creates or reopens a run folder; ArtifactError where it belongs to another config or cannot be written."""
    run_dir = run_dir.absolute()
    with explain_os_errors(run_dir):
        if run_dir.exists() and not run_dir.is_dir():
            raise ArtifactError(f"{run_dir}: is a file; choose another --run-dir")
        _make_folder(run_dir)
        path = run_dir / CONFIG_FILE
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        # Where nothing is published yet there is nothing to redo: a run that never began may change its mind.
        if path.is_file() and any((run_dir / stage / MANIFEST).is_file() for stage in STAGES):
            _check_same_config(path, config, accept_config_change, reporter)
        temporary = path.with_name(f".{CONFIG_FILE}.partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    return JobContext(config=config, run_dir=run_dir, reporter=reporter)


def _make_folder(run_dir: Path) -> None:
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise ArtifactError(
            f"{run_dir}: cannot be created ({error.strerror}: {error.filename}); choose another --run-dir"
        ) from None


def _check_same_config(path: Path, config: Config, accept: bool, reporter: Reporter) -> None:
    try:
        known = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path}: damaged ({error.__class__.__name__}); choose another --run-dir"
        ) from None
    differences = config_differences(known, config.model_dump(mode="json"))
    if not differences:
        return
    shown = "; ".join(differences[:4]) + (
        f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
    )
    if not accept:
        raise ArtifactError(
            f"{path.parent}: holds a run of another config ({shown}); choose another --run-dir, or add "
            f"--accept-config-change to redo the stages that this concerns"
        )
    reporter.line(f"config changed: {shown}; stages that depend on it are run again")


def config_differences(known: Any, wanted: Any, prefix: str = "") -> list[str]:
    """`key: old -> new` for every differing leaf; operational sections and keys never count."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        found: list[str] = []
        for key in [*wanted, *(key for key in known if key not in wanted)]:
            if not prefix and key in OPERATIONAL_SECTIONS:
                continue
            if f"{prefix}{key}" in OPERATIONAL_KEYS:
                continue
            found += config_differences(known.get(key), wanted.get(key), f"{prefix}{key}.")
        return found
    if known == wanted:
        return []
    return [f"{prefix[:-1]}: {known!r} -> {wanted!r}"]
