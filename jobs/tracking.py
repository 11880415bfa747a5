"""Where training curves go: TensorBoard event files by default, W&B or MLflow by config, Prometheus through Ray."""

from __future__ import annotations

import html
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jobs.metric_names import DESCRIPTIONS
from morlaif_ray.config import Config
from morlaif_ray.errors import ConfigError


class Tracker(Protocol):
    """Takes the metrics of one step of one training."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files under `<run>/tensorboard/<training>/`."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def log_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        self._writer.add_text(name, markdown_table(columns, rows), step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    def __init__(self, project: str, training: str, config: Config) -> None:
        wandb = _optional("wandb")
        self._run = wandb.init(
            project=project,
            name=f"{config.name}-{training}",
            config=config.model_dump(mode="json"),
            reinit="create_new",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        table = _optional("wandb").Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    def __init__(self, project: str, training: str, config: Config) -> None:
        mlflow = _optional("mlflow")
        self._client = mlflow.tracking.MlflowClient()
        experiment = mlflow.set_experiment(project)
        self._run = self._client.create_run(
            experiment.experiment_id, run_name=f"{config.name}-{training}"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._client.log_metric(self._run.info.run_id, name, value, step=step)

    def log_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        text = markdown_table(columns, rows)
        self._client.log_text(self._run.info.run_id, text, f"{name}/{step}.md")

    def close(self) -> None:
        self._client.set_terminated(self._run.info.run_id)


def open_tracker(config: Config, run_dir: Path, training: str) -> Tracker:
    """The configured tracker for one training (an arm of the policy stage)."""
    kind = config.tracking.tracker
    if kind == "tensorboard":
        return TensorBoardTracker(run_dir / "tensorboard" / training)
    if kind == "wandb":
        return WandbTracker(config.tracking.project, training, config)
    if kind == "mlflow":
        return MlflowTracker(config.tracking.project, training, config)
    return NoTracker()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells hold any text: what would end a cell or a row, or be read as HTML, is escaped."""

    def cell(text: str) -> str:
        return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")

    lines = [columns, ["---"] * len(columns), *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _optional(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"tracking.tracker is '{name}' but the package is not installed; pip install 'morlaif-ray[{name}]'"
        ) from None


class PrometheusGauges:
    """The same numbers as Ray metrics `ray_morlaif_<name>{arm}`, for the Ray dashboard's Prometheus and Grafana."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}
        self._lock = threading.Lock()

    def log(self, arm: str, metrics: Mapping[str, float]) -> None:
        from ray.util.metrics import Gauge

        with self._lock:
            for name, value in metrics.items():
                if not math.isfinite(value):
                    continue
                if name not in self._gauges:
                    self._gauges[name] = Gauge(
                        f"morlaif_{name}",
                        description=f"morlaif policy training: {DESCRIPTIONS.get(name, name)}",
                        tag_keys=("arm",),
                    )
                self._gauges[name].set(value, tags={"arm": arm})
