"""A scored rollout batch as one file: what a one-step-off run must find again beside its checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from morlaif_ray.errors import ArtifactError, explain_os_errors
from morlaif_ray.types import FloatArray, RolloutBatch

_ARRAYS = (
    "tokens_BL",
    "prompt_lengths_B",
    "response_lengths_B",
    "logprobs_BT",
    "truncated_B",
)


def write_rollouts(path: Path, batch: RolloutBatch, scores: Mapping[str, FloatArray]) -> None:
    """Publishes batch and scores (by name) as one file: arrays and JSON, no pickle."""
    texts = {
        "prompts": batch.prompts,
        "responses": batch.responses,
        "policy_version": batch.policy_version,
    }
    arrays = {name: getattr(batch, name) for name in _ARRAYS} | dict(scores)
    arrays["texts"] = np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)


def read_rollouts(path: Path) -> tuple[RolloutBatch, dict[str, FloatArray]]:
    """What `write_rollouts` wrote; ArtifactError where it is missing or damaged."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            texts = json.loads(arrays["texts"].tobytes())
            batch = RolloutBatch(
                prompts=tuple(texts["prompts"]),
                responses=tuple(texts["responses"]),
                policy_version=int(texts["policy_version"]),
                **{name: arrays[name] for name in _ARRAYS},
            )
            others = set(arrays.files).difference(_ARRAYS, ["texts"])
            return batch, {name: arrays[name] for name in others}
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: the responses in flight of this checkpoint are missing; remove {path.parent.parent} to begin "
            f"this arm again"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ArtifactError(
            f"{path}: damaged ({error}); remove {path.parent.parent} to begin this arm again"
        ) from None
