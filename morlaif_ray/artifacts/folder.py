"""Stage folders that are whole or absent.

    stage = StageFolder(run_dir, "2_feedback", config_part={...}, inputs={"1_pairs": hash}, seed=0)
    if stage.is_current(): ...            # same config, same inputs: skip the work
    with stage.writing() as folder: ...   # a temporary folder; published by fsync + rename on success

A stage that was published under another config or other inputs is moved to `superseded/`, never deleted.
Partial work that must survive a crash (checkpoints, resumable training) lives in `work/<stage>/`, not in the stage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from morlaif_ray import __version__
from morlaif_ray.durability import sync_path
from morlaif_ray.errors import ArtifactError, explain_os_errors
from morlaif_ray.seeding import stable_hash

MANIFEST = "manifest.json"
STAGES = (
    "0_sft",
    "1_pairs",
    "2_feedback",
    "3_preference_models",
    "4_reward",
    "4_sweep",
    "5_policy",
    "6_evaluation",
)


def canonical_json(value: Any) -> str:
    """The same text for equal values, whatever the key order."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class Manifest:
    """What a published stage was made from. Holds no time stamp: same inputs, same bytes."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Stage name -> manifest hash of the stage that was read."""
    seed: int
    rows: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Relative path -> SHA-256."""
    code_version: str = __version__

    @property
    def recipe_hash(self) -> str:
        """Identity of what the stage should be: config, inputs, seed and code version."""
        recipe = {
            "stage": self.stage,
            "config": self.config,
            "inputs": self.inputs,
            "seed": self.seed,
            "code_version": self.code_version,
        }
        return stable_hash(canonical_json(recipe))

    @property
    def content_hash(self) -> str:
        """Identity of what the stage is: its recipe and its files' bytes."""
        return stable_hash(self.recipe_hash, canonical_json(self.files))

    def to_json(self) -> str:
        return json.dumps(self.__dict__, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a published stage; None where there is none; ArtifactError where it is damaged."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**raw)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path}: damaged manifest ({error}); move the folder {folder.name} away and run again"
        ) from None


class StageFolder:
    """One stage of one run: decides whether it is current, and publishes it atomically."""

    def __init__(
        self,
        run_dir: Path,
        name: str,
        *,
        config_part: Mapping[str, Any],
        inputs: Mapping[str, str],
        seed: int,
    ) -> None:
        self.run_dir = run_dir
        self.name = name
        self.path = run_dir / name
        self.work_dir = run_dir / "work" / name
        self.wanted = Manifest(stage=name, config=dict(config_part), inputs=dict(inputs), seed=seed)

    def is_current(self) -> bool:
        """True where the published stage was made by this recipe and its files are all there."""
        manifest = read_manifest(self.path)
        if manifest is None:
            return False
        missing = [name for name in manifest.files if not (self.path / name).is_file()]
        if missing:
            raise ArtifactError(
                f"{self.path}: file '{missing[0]}' of the manifest is missing; "
                f"move the folder away and run again"
            )
        return manifest.recipe_hash == self.wanted.recipe_hash

    def content_hash(self) -> str:
        manifest = read_manifest(self.path)
        if manifest is None:
            raise ArtifactError(f"{self.path}: not published yet; run the stage first")
        return manifest.content_hash

    def resumable_work_dir(self) -> Path:
        """Folder for partial work of exactly this recipe. Leftovers of another recipe are moved away."""
        marker = self.work_dir / "recipe"
        if self.work_dir.exists():
            known = marker.read_text(encoding="utf-8") if marker.is_file() else ""
            if known != self.wanted.recipe_hash:
                self._supersede(self.work_dir, f"work-{self.name}")
        with explain_os_errors(self.work_dir):
            self.work_dir.mkdir(parents=True, exist_ok=True)
            marker.write_text(self.wanted.recipe_hash, encoding="utf-8")
        return self.work_dir

    @contextmanager
    def writing(self, rows: dict[str, int] | None = None) -> Iterator[Path]:
        """Yields a temporary folder; on a clean exit it becomes the stage. `rows` may be filled inside the block."""
        counts: dict[str, int] = rows if rows is not None else {}
        temporary = self.run_dir / f".{self.name}.partial"
        with explain_os_errors(self.path):
            if temporary.exists():
                shutil.rmtree(temporary)  # half-written by a run that was killed: never published
            temporary.mkdir(parents=True)
            try:
                yield temporary
                self._publish(temporary, counts)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def _publish(self, temporary: Path, rows: dict[str, int]) -> None:
        files = {
            str(path.relative_to(temporary)): file_hash(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(
            stage=self.name,
            config=self.wanted.config,
            inputs=self.wanted.inputs,
            seed=self.wanted.seed,
            rows=dict(sorted(rows.items())),
            files=files,
        )
        (temporary / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        for path in temporary.rglob(
            "*"
        ):  # folders, too: their entries must be on disk before the rename
            sync_path(path)
        sync_path(temporary)
        if self.path.exists():
            self._supersede(self.path, self.name)
        temporary.rename(self.path)
        sync_path(self.run_dir)

    def _supersede(self, folder: Path, label: str) -> None:
        shelf = self.run_dir / "superseded"
        with explain_os_errors(shelf):
            shelf.mkdir(parents=True, exist_ok=True)
            taken = [entry.name.rpartition(".") for entry in shelf.iterdir()]
            numbers = [
                int(number) for name, _, number in taken if name == label and number.isdigit()
            ]
            folder.rename(shelf / f"{label}.{max(numbers, default=0) + 1}")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
