"""All preference models of a run behind one call: `panel.score(texts) -> ScoreTable` in a fixed column order.

Placement is a choice, not a code path: one actor per saved model, or all in one actor; adapters on one backbone are
always one actor. `submit` scores while the caller goes on (say, as responses finish). Raw scores; the normaliser
belongs to the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from actors.placement import PANEL_CPUS
from actors.preference_model import spawn_preference_model
from actors.supervision import Call, PendingCalls, SupervisedActor, call_all, wait_all_ready
from morlaif_ray.artifacts import read_json
from morlaif_ray.config import Config
from morlaif_ray.errors import ActorLostError, ArtifactError, NumericalError
from morlaif_ray.preference.vllm_pooling import PoolingSettings
from morlaif_ray.types import FloatArray, ScoreTable

Missing = Literal["error", "mark"]
"""What a score that could not be had does: error, or NaN with a reason."""
MODEL_CARD = "preference_model.json"


@dataclass(frozen=True)
class Column:
    """One score column: a head of a saved model."""

    name: str
    folder: str
    head: int
    head_name: str | None = None
    """What the saved model calls that head; None: as the column."""


def panel_columns(folder: Path, wanted_baselines: Sequence[str]) -> list[Column]:
    """The K principles in panel order, then `baseline_<name>` for the wanted baselines (from `panel.json`).

    ArtifactError where a baseline was not trained or the folder of a model is absent.
    """
    card = read_json(folder / "panel.json")
    entries = [(name, card["models"].get(name)) for name in card["principles"]]
    for name in wanted_baselines:
        if name not in card["baselines"]:
            raise ArtifactError(
                f"{folder / 'panel.json'}: no baseline '{name}'; add it to preference.baselines and train again"
            )
        entries.append((f"baseline_{name}", card["baselines"][name]))
    columns = []
    for name, entry in entries:
        model = folder / entry["folder"] if entry is not None else folder / "models" / name
        if entry is None or not (model / MODEL_CARD).is_file():
            raise ArtifactError(
                f"{folder}: the preference model of '{name}' is missing (no {model / MODEL_CARD}); train stage 3 again"
            )
        columns.append(Column(name, str(model), int(entry["head"]), entry.get("principle")))
    return columns


class PendingScores:
    """Scores under way. `result()` waits; a lost actor is started again and its texts are sent to it once more."""

    def __init__(
        self,
        columns: Sequence[Column],
        num_texts: int,
        calls: Sequence[tuple[Mapping[str, Sequence[int]], PendingCalls]],
        missing: Missing,
    ) -> None:
        self._columns = tuple(columns)
        self._num_texts = num_texts
        self._calls = list(calls)
        self._missing = missing

    def result(self) -> ScoreTable:
        """Raw scores [B, columns]. With `missing="mark"` NaN, and why, where a score could not be had."""
        scores: dict[tuple[str, int], FloatArray] = {}
        reasons = []
        for wanted, pending in self._calls:
            try:
                answer = pending.results()[0]
            except ActorLostError as error:
                if self._missing == "error":
                    raise
                reasons.append(error.message)
                continue
            for folder, heads in wanted.items():
                scores |= {(folder, head): answer[folder][:, i] for i, head in enumerate(heads)}
        absent = np.full(self._num_texts, np.nan)
        scores_BK = np.stack(
            [scores.get((column.folder, column.head), absent) for column in self._columns], axis=1
        )
        reasons += self._non_finite(scores_BK, scores)
        scores_BK[~np.isfinite(scores_BK)] = np.nan
        names = tuple(column.name for column in self._columns)
        return ScoreTable(scores_BK=scores_BK, principles=names, reasons=tuple(reasons))

    def _non_finite(
        self, scores_BK: FloatArray, scores: Mapping[tuple[str, int], FloatArray]
    ) -> list[str]:
        reasons = []
        for index, column in enumerate(self._columns):
            rows = np.flatnonzero(~np.isfinite(scores_BK[:, index]))
            if not len(rows) or (column.folder, column.head) not in scores:
                continue
            reason = f"preference model '{column.name}' gave a non-finite score for text {rows[0]}"
            if self._missing == "error":
                raise NumericalError(reason)
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            reasons.append(f"{reason}{more}")
        return reasons


class PreferencePanel:
    """Owns its actors; `close()` ends them. Safe to use from several threads."""

    def __init__(
        self,
        config: Config,
        columns: Sequence[Column],
        say: Callable[[str], None],
        *,
        num_actors: int = 1,
    ) -> None:
        """`num_actors`: how many share the saved models where the config puts these together (not adapters)."""
        self.columns = tuple(columns)
        bank = config.preference.scores_as_bank
        self._groups = _groups(config, columns, num_actors)
        self._actors = [
            SupervisedActor(
                f"preference model {', '.join(Path(folder).name for folder in group)}",
                _spawner(config, group, columns, bank),
                max_restarts=config.policy.max_restarts,
                start_timeout_s=config.cluster.start_timeout_s,
                call_timeout_s=config.policy.call_timeout_s,
                say=say,
            )
            for group in self._groups
        ]
        wait_all_ready(self._actors)

    def score(
        self,
        texts: Sequence[str],
        columns: Sequence[str] | None = None,
        *,
        missing: Missing = "error",
    ) -> ScoreTable:
        """Raw scores [B, columns] of dialogues (prompt and response in one text).

        `columns` (default: all, in panel order) names the wanted ones: models behind the others do no work.
        """
        return self.submit(texts, columns, missing=missing).result()

    def submit(
        self,
        texts: Sequence[str],
        columns: Sequence[str] | None = None,
        *,
        missing: Missing = "error",
    ) -> PendingScores:
        """Sends the texts off and returns at once. Batches sent one after another are scored in that order."""
        chosen = self._chosen(columns)
        calls = []
        for actor, group in zip(self._actors, self._groups, strict=True):
            wanted: dict[str, list[int]] = {}
            for column in chosen:
                if column.folder in group and column.head not in wanted.get(column.folder, []):
                    wanted.setdefault(column.folder, []).append(column.head)
            if wanted:
                call = Call(actor, "score", (list(texts), wanted))
                calls.append((wanted, PendingCalls([call])))
        return PendingScores(chosen, len(texts), calls, missing)

    def check_health(self) -> int:
        """Asks every actor; a dead or hanging one is started again. Returns the restarts so far."""
        call_all([Call(actor, "ping") for actor in self._actors])
        return sum(actor.num_restarts for actor in self._actors)

    def close(self) -> None:
        for actor in self._actors:
            actor.stop()

    def _chosen(self, names: Sequence[str] | None) -> list[Column]:
        if names is None:
            return list(self.columns)
        known = {column.name: column for column in self.columns}
        for name in names:
            if name not in known:
                raise ValueError(f"the panel has no column '{name}'; it has {', '.join(known)}")
        return [known[name] for name in names]


def _groups(config: Config, columns: Sequence[Column], num_actors: int) -> list[list[str]]:
    """Folders of each actor."""
    folders = list(dict.fromkeys(column.folder for column in columns))
    if config.preference.scores_as_bank:
        return [folders]
    if config.preference.panel_placement == "per_model":
        return [[folder] for folder in folders]
    return [folders[index::num_actors] for index in range(min(num_actors, len(folders)))]


def _spawner(
    config: Config, group: list[str], columns: Sequence[Column], bank: bool
) -> Callable[[], Any]:
    names: dict[str, dict[int, str]] = {folder: {} for folder in group}
    for column in columns:
        if column.folder in names:
            names[column.folder][column.head] = column.head_name or column.name
    num_models = 1 if bank else len(group)
    vllm = None
    if config.preference.engine == "vllm":
        vllm = PoolingSettings(
            max_num_seqs=config.preference.score_batch_size,
            max_tokens=config.preference.score_tokens_per_batch,
            gpu_share=config.policy.panel_gpus_per_model,
            **config.preference.vllm.model_dump(),
        )
    return lambda: spawn_preference_model(
        group,
        batch_size=config.preference.score_batch_size,
        num_cpus=PANEL_CPUS,
        num_gpus=config.policy.panel_gpus_per_model * num_models,
        max_tokens=config.preference.score_tokens_per_batch,
        bank=bank,
        heads=names,
        last_block_at_end=config.preference.last_block_at_end,
        vllm=vllm,
    )
