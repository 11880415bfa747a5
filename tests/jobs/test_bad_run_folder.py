"""A run folder that is damaged, full, or another run's ends in one line; what was published stays."""

from __future__ import annotations

import errno
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import fit_weights
from jobs.cli import main
from tests.jobs.commands import Ended, FinishedRun, file_hashes, setting, small

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(2400)]


def test_a_run_folder_of_another_config_says_what_differs_and_stays_as_it_is(
    morlaif: Callable[..., Ended], run_copy: Path
) -> None:
    before = file_hashes(run_copy)
    ended = morlaif(*small(run_copy, *setting("sft.num_steps=31", "reward.num_bootstrap=51")))
    assert ended == Ended(
        3,
        f"{run_copy}: holds a run of another config (sft.num_steps: 30 -> 31; reward.num_bootstrap: 50 -> 51); "
        f"choose another --run-dir, or add --accept-config-change to redo the stages that this concerns",
    )
    assert file_hashes(run_copy) == before


def test_sections_that_change_no_result_make_no_other_config(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    words = setting("cluster.object_store_mb=100", "tracking.tracker=none")
    assert main(small(run_copy, *words, verb="fit_weights")) == 0
    assert "4_reward: up to date, skipped" in capsys.readouterr().err
    signal.signal(signal.SIGTERM, handler)


def test_a_damaged_config_in_the_run_folder_is_named(
    morlaif: Callable[..., Ended], run_copy: Path
) -> None:
    (run_copy / "config.yaml").write_text("a: [")
    ended = morlaif(*small(run_copy))
    assert ended.code == 3
    assert ended.error.startswith(f"{run_copy}/config.yaml: damaged (")


def test_a_stage_that_lacks_a_file_of_its_manifest_names_the_file(
    morlaif: Callable[..., Ended], run_copy: Path
) -> None:
    (run_copy / "1_pairs" / "reference.parquet").unlink()
    assert morlaif(*small(run_copy)) == Ended(
        3,
        f"{run_copy}/1_pairs: file 'reference.parquet' of the manifest is missing; "
        f"move the folder away and run again",
    )


def test_a_damaged_manifest_is_named(morlaif: Callable[..., Ended], run_copy: Path) -> None:
    (run_copy / "1_pairs" / "manifest.json").write_text("{")
    ended = morlaif(*small(run_copy))
    assert ended.code == 3
    assert re.match(
        rf"{run_copy}/1_pairs/manifest.json: damaged manifest \(.*\); move the folder 1_pairs away",
        ended.error,
    )


def test_a_stage_before_its_inputs_says_which_one_to_run(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = morlaif(*small(tmp_path / "run", verb="fit_weights"))
    assert ended == Ended(3, f"{tmp_path}/run/1_pairs: not published yet; run the stage first")


def test_a_run_folder_below_a_file_cannot_be_created(
    morlaif: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    ended = morlaif(*small(tmp_path / "file" / "run"))
    assert ended.code == 3
    assert ended.error.startswith(f"{tmp_path}/file/run: cannot be created (Not a directory: ")
    assert ended.error.endswith("choose another --run-dir")
    assert morlaif(*small(tmp_path / "file")).error == (
        f"{tmp_path}/file: is a file; choose another --run-dir"
    )


def test_a_read_only_run_folder_is_said_to_be_one(
    morlaif: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # tests may run as root, whom no mode stops
    assert morlaif(*small(tmp_path / "run")) == Ended(
        3,
        f"{tmp_path}/run: cannot be written (Read-only file system); choose another --run-dir",
    )


def test_a_full_disk_at_the_start_leaves_the_old_config_as_it_was(
    morlaif: Callable[..., Ended], run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file_hashes(run_copy)

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    ended = morlaif(*small(run_copy))
    assert ended == Ended(
        3,
        f"{run_copy}: the disk is full; free some space and run the same command again "
        f"(what was published stays)",
    )
    assert file_hashes(run_copy) == before


@pytest.mark.parametrize("where", ["stage", "work"])
def test_a_full_disk_in_a_stage_loses_nothing_and_the_same_command_goes_on(
    morlaif: Callable[..., Ended],
    run_copy: Path,
    finished_run: FinishedRun,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    shutil.rmtree(run_copy / "4_reward")
    before = file_hashes(run_copy)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        # Inside the stage folder, and outside of it (checkpoints and other unfinished work).
        patch.setattr(
            fit_weights, "write_reward" if where == "stage" else "read_reward_inputs", full
        )
        ended = morlaif(*small(run_copy, verb="fit_weights"))
    assert ended.code == 3
    assert ended.error.endswith(
        "the disk is full; free some space and run the same command again (what was published stays)"
    )
    assert file_hashes(run_copy) == before
    assert not (run_copy / ".4_reward.partial").exists()
    handler = signal.getsignal(signal.SIGTERM)
    assert main(small(run_copy, verb="fit_weights")) == 0
    signal.signal(signal.SIGTERM, handler)
    assert file_hashes(run_copy) == file_hashes(finished_run.run_dir)
