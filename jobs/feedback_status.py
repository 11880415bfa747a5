"""`morlaif feedback status --run-dir DIR`: done, left, failed, spent, rate, time left, bias, agreement, last errors.

Reads the run folder and, read-only, the ledger, also while a run is going on. Starts nothing and needs no Ray.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from morlaif_ray.artifacts import read_records
from morlaif_ray.errors import ArtifactError
from morlaif_ray.feedback.status import describe, read_status
from morlaif_ray.types import ResponsePair

CONFIG_FILE = "config.yaml"
PROGRESS = ("logs", "feedback_progress.json")


def status_lines(run_dir: Path) -> list[str]:
    """What the command prints. ArtifactError where `run_dir` is no run folder or its stage 2 has not begun."""
    path = run_dir / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ArtifactError(
            f"{run_dir}: no run folder ({CONFIG_FILE} is missing); give --run-dir"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path}: cannot be read ({type(error).__name__})") from None
    shared = (config.get("feedback") or {}).get("ledger_path")
    ledger = Path(shared) if shared else run_dir / "ledger" / "feedback.sqlite"
    return describe(read_status(ledger, run_dir.joinpath(*PROGRESS), _labels(run_dir)))


def _labels(run_dir: Path) -> dict[str, float]:
    path = run_dir / "1_pairs" / "pairs.parquet"
    if not path.is_file():
        return {}
    return {pair.pair_id: pair.human_label for pair in read_records(path, ResponsePair)}
