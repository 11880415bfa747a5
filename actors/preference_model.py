"""A preference model with a process: scores texts on its heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.allocation import keep_freed_memory
from actors.spawning import spawn
from actors.training import set_single_thread
from morlaif_ray.errors import ArtifactError
from morlaif_ray.preference import AdapterBank, PreferenceModel
from morlaif_ray.preference.vllm_pooling import PooledPreferenceModel, PoolingSettings
from morlaif_ray.types import FloatArray
from morlaif_ray.vllm_environment import CPU_ENVIRONMENT, ENVIRONMENT

Wanted = Mapping[str, Sequence[int]]
"""Heads to score, by folder of the saved model."""


class PreferenceModelActor:
    """Plain class; `spawn_preference_model` gives it a process. Holds one or several saved models.

    With `bank` the folders are adapters on one backbone, which is loaded once, and a call is one pass for all of them.
    """

    def __init__(
        self,
        folders: Sequence[str],
        batch_size: int,
        device: str = "cpu",
        max_tokens: int | None = None,
        bank: bool = False,
        heads: Mapping[str, Mapping[int, str]] | None = None,
        last_block_at_end: bool = False,
        vllm: PoolingSettings | None = None,
    ) -> None:
        """`vllm`: its engines score, which have their own limits; None: the models of this project."""
        keep_freed_memory()
        set_single_thread()
        self._limits: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens}
        self._models: dict[str, PreferenceModel | PooledPreferenceModel] = {}
        self._bank = AdapterBank.load(folders) if bank else None
        if self._bank is not None:
            self._bank.model.to(device)
            names = {folder: self._bank.cards[folder].heads for folder in folders}
        elif vllm is not None:
            self._limits = {}
            self._models = {folder: PooledPreferenceModel(folder, vllm) for folder in folders}
            names = {folder: self._models[folder].heads for folder in folders}
        else:
            for folder in folders:
                model = PreferenceModel.load(folder)
                model.model.to(device)
                model.last_block_at_end = last_block_at_end
                self._models[folder] = model
            names = {folder: self._models[folder].heads for folder in folders}
        self._names = names
        for folder, expected in (heads or {}).items():
            _check_heads(folder, names[folder], expected)

    def ping(self) -> int:
        return len(self._names)

    def score(self, texts: Sequence[str], wanted: Wanted | None = None) -> dict[str, FloatArray]:
        """Raw scores [B, wanted heads] per wanted folder (default: all heads of all); may be non-finite."""
        if wanted is None:
            wanted = {folder: range(len(names)) for folder, names in self._names.items()}
        if self._bank is not None:
            found = self._bank.score_folders(texts, list(wanted), **self._limits)
            return {folder: found[folder][:, list(heads)] for folder, heads in wanted.items()}
        return {
            folder: self._models[folder].raw_scores(texts, list(heads), **self._limits)
            for folder, heads in wanted.items()
        }


def _check_heads(folder: str, names: Sequence[str], expected: Mapping[int, str]) -> None:
    """A panel that reads another head's column would train a policy on the wrong principle."""
    for index, name in expected.items():
        if index >= len(names) or names[index] != name:
            found = names[index] if index < len(names) else f"only {len(names)} heads"
            raise ArtifactError(
                f"{Path(folder)}: head {index} should be '{name}', the folder has {found!r}; train stage 3 again"
            )


def spawn_preference_model(
    folders: Sequence[str],
    *,
    batch_size: int,
    num_cpus: float,
    num_gpus: float,
    max_tokens: int | None = None,
    bank: bool = False,
    heads: Mapping[str, Mapping[int, str]] | None = None,
    last_block_at_end: bool = False,
    vllm: PoolingSettings | None = None,
) -> Any:
    """An actor handle of a `PreferenceModelActor` that reserves the given CPUs and GPUs."""
    device = "cuda" if num_gpus else "cpu"
    environment = ENVIRONMENT | ({} if num_gpus else CPU_ENVIRONMENT)
    return spawn(
        PreferenceModelActor,
        list(folders),
        batch_size,
        device,
        max_tokens,
        bank,
        heads,
        last_block_at_end,
        vllm,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        environment=environment if vllm is not None else None,
    )
