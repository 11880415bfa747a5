"""Stage folders: whole or absent, current or superseded, never lost."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morlaif_ray.artifacts import (
    MANIFEST,
    Manifest,
    StageFolder,
    canonical_json,
    explain_os_errors,
    read_manifest,
)
from morlaif_ray.errors import ArtifactError, DataError

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]


def stage(run: Path, name: str = "1_pairs", seed: int = 0, **config: Any) -> StageFolder:
    return StageFolder(run, name, config_part=config, inputs={"0_sft": "abc"}, seed=seed)


def publish(folder: StageFolder, text: str = "hello") -> None:
    with folder.writing() as path:
        (path / "deep").mkdir()
        (path / "deep" / "file.txt").write_text(text, encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_published_stage_is_current_and_lists_its_files(tmp_path: Path) -> None:
    folder = stage(tmp_path, size=3)
    assert not folder.is_current()
    with folder.writing(rows := {}) as path:
        assert path.parent == tmp_path  # same file system: the rename is atomic
        assert not folder.path.exists()
        (path / "b.txt").write_text("b", encoding="utf-8")
        (path / "a").mkdir()
        (path / "a" / "x.txt").write_text("x", encoding="utf-8")
        rows |= {"pairs": 2, "bad": 1}
    assert folder.is_current()
    assert names(tmp_path) == ["1_pairs"]
    manifest = read_manifest(folder.path)
    assert manifest is not None
    assert list(manifest.files) == ["a/x.txt", "b.txt"]
    # sha256 of "b"
    assert manifest.files["b.txt"].startswith("3e23e8160039594a33894f6564e1b134")
    assert manifest.rows == {"bad": 1, "pairs": 2}
    assert (manifest.config, manifest.inputs, manifest.seed) == ({"size": 3}, {"0_sft": "abc"}, 0)


def test_equal_work_gives_equal_bytes(tmp_path: Path) -> None:
    for run in ("one", "two"):
        publish(stage(tmp_path / run, beta=0.05, name2="é"))
    first, second = ((tmp_path / run / "1_pairs" / MANIFEST).read_bytes() for run in ("one", "two"))
    assert first == second
    hashes = [stage(tmp_path / run, beta=0.05).content_hash() for run in ("one", "two")]
    assert hashes[0] == hashes[1]


def test_the_content_hash_follows_the_bytes_and_the_recipe(tmp_path: Path) -> None:
    hashes = set()
    for run, text, config in (("a", "x", 1), ("b", "y", 1), ("c", "x", 2)):
        publish(stage(tmp_path / run, value=config), text)
        hashes.add(stage(tmp_path / run).content_hash())
    assert len(hashes) == 3


def test_the_order_of_keys_is_no_part_of_the_recipe() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'
    one = Manifest("s", {"a": 1, "b": 2}, {}, 0)
    assert one.recipe_hash == Manifest("s", {"b": 2, "a": 1}, {}, 0, rows={"x": 1}).recipe_hash


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"inputs": {"0_sft": "abd"}}, {"config": {"a": 2}}, {"stage": "t"}]
)
def test_every_part_of_the_recipe_counts(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"stage": "s", "config": {"a": 1}, "inputs": {"0_sft": "abc"}, "seed": 0}
    assert Manifest(**base).recipe_hash != Manifest(**(base | change)).recipe_hash
    assert Manifest(**base).recipe_hash != Manifest(**base, code_version="0").recipe_hash


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), DataError("bad")])
def test_a_crash_inside_the_block_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    folder = stage(tmp_path)

    def crash() -> None:
        with folder.writing() as path:
            (path / "half.txt").write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(type(error)):
        crash()
    assert names(tmp_path) == []
    assert not folder.is_current()


def test_a_crash_leaves_the_published_stage_alone(tmp_path: Path) -> None:
    publish(stage(tmp_path, version=1), "old")

    def crash() -> None:
        with stage(tmp_path, version=2).writing() as path:
            (path / "file.txt").write_text("new", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        crash()
    assert stage(tmp_path, version=1).is_current()
    assert names(tmp_path) == ["1_pairs"]


def test_leftovers_of_a_killed_run_are_not_published(tmp_path: Path) -> None:
    (tmp_path / ".1_pairs.partial").mkdir()
    (tmp_path / ".1_pairs.partial" / "half.txt").write_text("half", encoding="utf-8")
    publish(stage(tmp_path))
    assert names(tmp_path / "1_pairs") == ["deep", MANIFEST]


def test_a_stage_of_another_recipe_is_superseded_not_deleted(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        folder = stage(tmp_path, version=version)
        assert not folder.is_current()
        publish(folder, str(version))
    assert names(tmp_path / "superseded") == ["1_pairs.1", "1_pairs.2"]
    for number in (1, 2):
        old = tmp_path / "superseded" / f"1_pairs.{number}"
        assert (old / "deep" / "file.txt").read_text(encoding="utf-8") == str(number)
    assert not stage(tmp_path, version=2).is_current()


def test_a_superseded_stage_that_was_removed_by_hand_leaves_no_clash(tmp_path: Path) -> None:
    shelf = tmp_path / "superseded"
    for number in ("1_pairs.2", "1_pairs.notes", "work-1_pairs.7"):
        (shelf / number).mkdir(parents=True)
        (shelf / number / "kept.txt").write_text("kept", encoding="utf-8")
    publish(stage(tmp_path, version=1))
    publish(stage(tmp_path, version=2))
    assert "1_pairs.3" in names(shelf)
    assert (shelf / "1_pairs.2" / "kept.txt").exists()


def test_a_listed_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    publish(stage(tmp_path))
    (tmp_path / "1_pairs" / "deep" / "file.txt").unlink()
    with pytest.raises(
        ArtifactError, match=r"file 'deep/file.txt' of the manifest is missing; move"
    ):
        stage(tmp_path).is_current()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "x"}', '{"surprise": 1}', "\xff"])
def test_a_damaged_manifest_is_an_error_in_one_line(tmp_path: Path, text: str) -> None:
    publish(stage(tmp_path))
    (tmp_path / "1_pairs" / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ArtifactError, match=r"manifest.json: damaged manifest \(.*1_pairs away"
    ) as e:
        stage(tmp_path).is_current()
    assert "\n" not in str(e.value)


def test_the_content_of_an_unpublished_stage_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="1_pairs: not published yet; run the stage first"):
        stage(tmp_path).content_hash()


def test_partial_work_is_kept_for_its_own_recipe_only(tmp_path: Path) -> None:
    first = stage(tmp_path, version=1).resumable_work_dir()
    (first / "checkpoint").write_text("half", encoding="utf-8")
    again = stage(tmp_path, version=1).resumable_work_dir()
    assert again == first == tmp_path / "work" / "1_pairs"
    assert (again / "checkpoint").exists()
    other = stage(tmp_path, version=2).resumable_work_dir()
    assert names(other) == ["recipe"]
    kept = tmp_path / "superseded" / "work-1_pairs.1" / "checkpoint"
    assert kept.read_text(encoding="utf-8") == "half"


def test_a_work_folder_without_its_recipe_is_moved_away(tmp_path: Path) -> None:
    (tmp_path / "work" / "1_pairs").mkdir(parents=True)
    (tmp_path / "work" / "1_pairs" / "stray").touch()
    assert names(stage(tmp_path).resumable_work_dir()) == ["recipe"]


DISK_FULL = "the disk is full; free some space and run the same command again"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, DISK_FULL),
        (errno.EDQUOT, DISK_FULL),
        (errno.EACCES, r"cannot be written \(Permission denied\); choose another --run-dir"),
        (errno.EROFS, r"cannot be written \(Read-only file system\); choose another --run-dir"),
    ],
)
@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.mkdir", "pathlib.Path.rename"])
def test_a_disk_that_refuses_is_one_line_and_keeps_what_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str, where: str
) -> None:
    publish(stage(tmp_path, version=1))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(where, refuse)
        with pytest.raises(ArtifactError, match=message) as caught:
            publish(stage(tmp_path, version=2))
    assert "\n" not in str(caught.value)
    assert stage(tmp_path, version=1).is_current()
    publish(stage(tmp_path, version=2))  # the same command again, with space
    assert stage(tmp_path, version=2).is_current()


def raise_in(folder: Path, make: Callable[[], Exception]) -> None:
    with explain_os_errors(folder):
        raise make()


def test_an_error_of_rust_code_is_explained_by_its_number(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(ArtifactError, match=DISK_FULL):
        raise_in(tmp_path, lambda: SafetensorError(text))


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "gone"), ValueError("x"), DataError("bad row")):
        with pytest.raises(type(error)) as caught:
            raise_in(tmp_path, lambda error=error: error)
        assert caught.value is error


def test_a_manifest_holds_no_time_stamp(tmp_path: Path) -> None:
    publish(stage(tmp_path))
    raw = json.loads((tmp_path / "1_pairs" / MANIFEST).read_text(encoding="utf-8"))
    assert set(raw) == {"stage", "config", "inputs", "seed", "rows", "files", "code_version"}
