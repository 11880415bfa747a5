"""A preference model with a process: scores texts on its heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.spawning import spawn
from actors.training import set_single_thread
from morlaif_ray.preference import PreferenceModel
from morlaif_ray.types import FloatArray


class PreferenceModelActor:
    """Plain class; `spawn_preference_model` gives it a process. Holds one or several saved models."""

    def __init__(self, folders: Sequence[str], batch_size: int, device: str = "cpu") -> None:
        set_single_thread()
        self._batch_size = batch_size
        self._models = {}
        for folder in folders:
            model = PreferenceModel.load(folder)
            model.model.to(device)
            self._models[folder] = model

    def ping(self) -> int:
        return len(self._models)

    def score(self, texts: Sequence[str]) -> dict[str, FloatArray]:
        """Raw scores [B, heads] per folder."""
        return {
            folder: model.score_heads(texts, batch_size=self._batch_size)
            for folder, model in self._models.items()
        }


def spawn_preference_model(
    folders: Sequence[str], *, batch_size: int, num_cpus: float, num_gpus: float
) -> Any:
    """An actor handle of a `PreferenceModelActor` that reserves the given CPUs and GPUs."""
    device = "cuda" if num_gpus else "cpu"
    return spawn(
        PreferenceModelActor,
        list(folders),
        batch_size,
        device,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
