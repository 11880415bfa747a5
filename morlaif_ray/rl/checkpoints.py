"""Checkpoints of the PPO learner: whole or not there, checked by hash, the newest few and the best one kept.

    checkpoint/             the newest: policy.safetensors, optimizer.safetensors, state.json, manifest.json
    checkpoint.00000040/    older ones by step

A checkpoint is written under a temporary name, fsynced, and renamed; its manifest holds the SHA-256 of every file. It
holds whole tensors by parameter name, so it does not depend on how many ranks wrote it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from morlaif_ray.artifacts.folder import file_hash
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.durability import sync_path
from morlaif_ray.errors import ArtifactError, explain_os_errors
from morlaif_ray.rl.sharding import like, whole

POLICY, OPTIMIZER, STATE, MANIFEST = (
    "policy.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
LEARNING_KEYS = (
    "batch_size", "samples_per_prompt", "num_epochs", "num_minibatches", "learning_rate", "warmup_steps",
    "schedule", "adam_betas", "weight_decay", "max_grad_norm", "temperature", "advantage", "gamma", "gae_lambda",
    "clip_range", "importance_cap", "value_clip_range", "value_coefficient", "separate_critic", "kl_estimator",
    "kl_coefficient", "adaptive_kl", "kl_target", "kl_horizon", "reward_clip", "scale_reward", "lora",
)  # fmt: skip
"""Keys of `policy` that a continued run must share with its checkpoint; the others change speed and memory alone."""


@dataclass(frozen=True)
class Snapshot:
    """The learner's state outside its config: trainable weights, Adam's moments, plain numbers."""

    policy: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """`<parameter>.<exp_avg | exp_avg_sq | step>`; empty before the first step."""
    extra: dict[str, Any]

    @classmethod
    def take(
        cls,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, Any],
    ) -> Snapshot:
        """Collective where tensors are sharded."""
        policy = {
            name: _plain(parameter) for name, parameter in zip(names, parameters, strict=True)
        }
        moments = {
            f"{name}.{key}": _plain(value)
            for name, parameter in zip(names, parameters, strict=True)
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        return cls(policy, moments, dict(extra))

    def put_back(
        self,
        path: Path,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Into a learner of the same shape; ArtifactError names the first tensor that does not fit."""
        unknown = set(self.policy).symmetric_difference(names)
        if unknown:
            raise ArtifactError(
                f"{path}: checkpoint of another model (tensor '{min(unknown)}' is in one of them only); move it away "
                f"and run again"
            )
        for name, parameter in zip(names, parameters, strict=True):
            stored = self.policy[name]
            if stored.shape != parameter.shape:
                raise ArtifactError(
                    f"{path}: checkpoint of another model (tensor '{name}' is {list(stored.shape)} there, "
                    f"{list(parameter.shape)} here); move it away and run again"
                )
            with torch.no_grad():
                parameter.copy_(like(stored, parameter))
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = self.optimizer.get(f"{name}.{key}")
                if value is not None:
                    state[key] = (
                        value.to(parameter.device) if key == "step" else like(value, parameter)
                    )
            if state:
                optimizer.state[parameter] = state


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read."""

    path: Path
    snapshot: Snapshot
    reward: float | None


class CheckpointFolder:
    """The checkpoints of one run, under one name."""

    def __init__(self, folder: Path, config: PolicyConfig, seed: int) -> None:
        self.folder = folder
        self._keep = config.keep_checkpoints
        plain = config.model_dump(mode="json")
        self._identity = {**{key: plain[key] for key in LEARNING_KEYS}, "seed": seed}

    def publish(self, snapshot: Snapshot, step: int, reward: float | None) -> None:
        """Writes a checkpoint; `reward`: mean since the one before, by which the best is kept."""
        with explain_os_errors(self.folder):
            temporary = self.folder.with_name(f".{self.folder.name}.partial")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(snapshot.policy, temporary / POLICY)
            save_file(snapshot.optimizer, temporary / OPTIMIZER)
            state = {"extra": snapshot.extra, "reward": reward, "identity": self._identity}
            (temporary / STATE).write_text(json.dumps(state, sort_keys=True), encoding="utf-8")
            names = (POLICY, OPTIMIZER, STATE)
            manifest = {"step": step, "files": {n: file_hash(temporary / n) for n in names}}
            text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
            (temporary / MANIFEST).write_text(text, encoding="utf-8")
            for name in (*names, MANIFEST, "."):
                sync_path(temporary / name)
            if self.folder.exists():
                self._shelve()
            temporary.rename(self.folder)
            sync_path(self.folder.parent)
            self._prune()

    def load(self, note: Callable[[str], None], *, tidy: bool = True) -> Found | None:
        """The newest checkpoint that is whole; None where there is none at all.

        A damaged one is passed over with one line to `note` (and, with `tidy`, set aside); ArtifactError where all are
        damaged, or where the newest belongs to another config.
        """
        damaged: list[tuple[Path, str]] = []
        for path in self._newest_first():
            try:
                found = self._read(path)
            except _DamagedError as error:
                damaged.append((path, str(error)))
                continue
            for bad, cause in damaged:
                note(f"{bad}: damaged checkpoint ({cause}); going on from {path.name}")
                if tidy and bad.exists():
                    aside = bad.with_name(f".{bad.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    bad.rename(aside)
            return found
        if damaged:
            bad, cause = damaged[0]
            raise ArtifactError(f"{bad}: damaged checkpoint ({cause}); remove it and run again")
        return None

    def _read(self, path: Path) -> Found:
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            for name in (POLICY, OPTIMIZER, STATE):
                if file_hash(path / name) != manifest["files"][name]:
                    raise _DamagedError(f"{name} is not what {MANIFEST} says")
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            self._check_identity(path, state["identity"])
            snapshot = Snapshot(
                load_file(path / POLICY), load_file(path / OPTIMIZER), state["extra"]
            )
            return Found(path, snapshot, state["reward"])
        except FileNotFoundError as error:
            raise _DamagedError(f"{Path(str(error.filename)).name} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _DamagedError(" ".join(str(error).split())) from None

    def _check_identity(self, path: Path, stored: Mapping[str, Any]) -> None:
        differing = [key for key, value in self._identity.items() if stored.get(key) != value]
        if differing:
            key = differing[0]
            name = key if key == "seed" else f"policy.{key}"
            raise ArtifactError(
                f"{path}: checkpoint of another config ({name} was {stored.get(key)}, now {self._identity[key]}); "
                f"write the old value, or move the folder away"
            )

    def _newest_first(self) -> list[Path]:
        newest = [self.folder] if self.folder.is_dir() else []
        return newest + self._older()

    def _older(self) -> list[Path]:
        """Shelved checkpoints, newest first. A kill between two renames leaves only these."""
        if not self.folder.parent.is_dir():
            return []
        prefix = f"{self.folder.name}."
        found = [
            path
            for path in self.folder.parent.iterdir()
            if path.name.startswith(prefix) and path.name.removeprefix(prefix).isdigit()
        ]
        return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)), reverse=True)

    def _shelve(self) -> None:
        """The present newest under its step's name; one that does not know its step is of no use."""
        try:
            step = int(json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(self.folder)
            return
        shelf = self.folder.with_name(f"{self.folder.name}.{step:08d}")
        shutil.rmtree(shelf, ignore_errors=True)
        self.folder.rename(shelf)

    def _prune(self) -> None:
        every = self._newest_first()
        best = max(every, key=_reward_of)  # of equals the newest
        for path in every[self._keep :]:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)


class _DamagedError(Exception):
    """A checkpoint cannot be used; the message is the cause."""


def _reward_of(path: Path) -> float:
    try:
        reward = json.loads((path / STATE).read_text(encoding="utf-8"))["reward"]
        return float("-inf") if reward is None else float(reward)
    except (OSError, ValueError, KeyError, TypeError):
        return float("-inf")


def _plain(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().contiguous()
