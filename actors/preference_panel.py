"""All preference models of a run behind one call: `panel.score(texts) -> ScoreTable` in a fixed column order.

Placement is a choice, not a code path: one actor per saved model, or all in one actor. Raw scores; the normaliser
belongs to the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.placement import PANEL_CPUS
from actors.preference_model import spawn_preference_model
from actors.supervision import Call, SupervisedActor, call_all, wait_all_ready
from morlaif_ray.artifacts import read_json
from morlaif_ray.config import Config
from morlaif_ray.errors import ArtifactError
from morlaif_ray.types import ScoreTable


@dataclass(frozen=True)
class Column:
    """One score column: a head of a saved model."""

    name: str
    folder: str
    head: int


def panel_columns(folder: Path, wanted_baselines: Sequence[str]) -> list[Column]:
    """The K principles in panel order, then `baseline_<name>` for the wanted baselines (from `panel.json`)."""
    card = read_json(folder / "panel.json")
    columns = []
    for name in card["principles"]:
        entry = card["models"][name]
        columns.append(Column(name, str(folder / entry["folder"]), int(entry["head"])))
    for name in wanted_baselines:
        if name not in card["baselines"]:
            raise ArtifactError(
                f"{folder / 'panel.json'}: no baseline '{name}'; add it to preference.baselines and train again"
            )
        entry = card["baselines"][name]
        columns.append(
            Column(f"baseline_{name}", str(folder / entry["folder"]), int(entry["head"]))
        )
    return columns


class PreferencePanel:
    """Owns its actors; `close()` ends them. Safe to use from several threads."""

    def __init__(
        self, config: Config, columns: Sequence[Column], say: Callable[[str], None]
    ) -> None:
        self.columns = tuple(columns)
        folders = list(dict.fromkeys(column.folder for column in columns))
        groups = (
            [folders]
            if config.preference.panel_placement == "one_actor"
            else [[f] for f in folders]
        )
        gpus = config.policy.panel_gpus_per_model
        batch_size = config.preference.score_batch_size

        def spawner(group: list[str]) -> Callable[[], Any]:
            return lambda: spawn_preference_model(
                group, batch_size=batch_size, num_cpus=PANEL_CPUS, num_gpus=gpus * len(group)
            )

        self._actors = [
            SupervisedActor(
                f"preference model {', '.join(Path(folder).name for folder in group)}",
                spawner(group),
                max_restarts=config.policy.max_restarts,
                start_timeout_s=config.cluster.start_timeout_s,
                call_timeout_s=config.policy.call_timeout_s,
                say=say,
            )
            for group in groups
        ]
        wait_all_ready(self._actors)

    def score(self, texts: Sequence[str]) -> ScoreTable:
        """Raw scores [B, columns] of dialogues (prompt and response in one text)."""
        answers: dict[str, Any] = {}
        for answer in call_all([Call(actor, "score", (list(texts),)) for actor in self._actors]):
            answers.update(answer)
        scores = np.stack(
            [answers[column.folder][:, column.head] for column in self.columns], axis=1
        )
        return ScoreTable(
            scores_BK=scores, principles=tuple(column.name for column in self.columns)
        )

    def close(self) -> None:
        for actor in self._actors:
            actor.stop()
