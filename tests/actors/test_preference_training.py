"""Preference trainings on a real local Ray: killed workers, restarts, errors that no restart would mend."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.preference_trials import fit_preference_models, preference_loop
from morlaif_ray.artifacts import write_table
from morlaif_ray.config import Config, parse_config
from morlaif_ray.errors import NumericalError
from morlaif_ray.preference import PreferenceModel
from tests.processes import WAIT_S, once

pytestmark = [
    pytest.mark.actors,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(600),
]
FOLDERS = ("models", "losses", "progress", "checkpoints", "notes", "failures")
NUM_PAIRS = 600


def config(**preference: Any) -> Config:
    settings = {
        "batch_size": 4,
        "num_epochs": 2,
        "learning_rate": 1e-3,
        "max_length": 24,
        "checkpoint_every": 20,
        "concurrent_trials": 1,
        "workers_per_trial": 1,
    }
    return parse_config({"preference": settings | preference}, "test")


def work_folder(folder: Path, spoil: float | None = None) -> Path:
    folder.mkdir()
    for name in FOLDERS:
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    sides: list[list[str]] = [[], []]
    good = rng.random((2, NUM_PAIRS)) < 0.5
    for side in range(2):
        for row in range(NUM_PAIRS):
            filler = " ".join(rng.choice(["red", "sun", "moon"], rng.integers(1, 9)))
            word = "good" if good[side, row] else "bad"
            sides[side].append(f"\n\nHuman: red\n\nAssistant: {word} {filler}")
    odds = 3.0 * (good[0].astype(float) - good[1])
    write_table(
        folder / "train.parquet",
        {
            "pair_id": [f"pair{row:04d}" for row in range(NUM_PAIRS)],
            "text_a": sides[0],
            "text_b": sides[1],
            "likes_good": odds,
        },
    )
    return folder


def settings(config: Config, work: Path, backbone: str) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "work_dir": str(work),
        "backbone": backbone,
        "name": "likes_good",
        "columns": ["likes_good"],
    }


def training_processes() -> list[psutil.Process]:
    """Ray Train's workers among the descendants of this process's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_workers(killed: list[int]) -> None:
    for process in training_processes():
        os.kill(process.pid, signal.SIGKILL)
        killed.append(process.pid)


def steps_done(path: Path) -> int:
    try:
        return len(json.loads(path.read_text(encoding="utf-8"))["extra"]["history"])
    except (OSError, ValueError):
        return 0


def test_a_killed_training_worker_goes_on_from_its_checkpoint_to_the_same_bits(
    backbone: str, tmp_path: Path
) -> None:
    quiet = work_folder(tmp_path / "quiet")
    preference_loop(settings(config(), quiet, backbone))  # in this process, never disturbed
    hit = work_folder(tmp_path / "hit")
    state = hit / "checkpoints" / "likes_good" / "checkpoint" / "state.json"
    killed: list[int] = []
    # At the first of fifteen checkpoints: however late the signal comes, there is something left to do.
    killer = once(lambda: steps_done(state) >= 20, lambda: kill_workers(killed))
    advanced: list[int] = []
    fit_preference_models(config(), hit, {"likes_good": ["likes_good"]}, backbone, advanced.append)
    killer.join(WAIT_S)
    assert len(killed) == 1
    assert sum(advanced) == 2 * NUM_PAIRS / 4
    for name in ("models/likes_good/model.safetensors", "losses/likes_good.csv"):
        assert (hit / name).read_bytes() == (quiet / name).read_bytes(), name
    model = PreferenceModel.load(hit / "models" / "likes_good")
    good, bad = model.score(
        ["\n\nHuman: red\n\nAssistant: good", "\n\nHuman: red\n\nAssistant: bad"]
    )
    assert good > bad


def test_a_loss_that_is_not_finite_ends_the_stage_at_once_with_the_pairs(
    backbone: str, tmp_path: Path
) -> None:
    work = work_folder(tmp_path / "work")
    hot = config(learning_rate=1e30, warmup_steps=0, max_failures=1, workers_per_trial=0)
    with pytest.raises(NumericalError) as caught:
        fit_preference_models(
            hot, work, {"likes_good": ["likes_good"]}, backbone, lambda amount: None
        )
    assert "preference model 'likes_good': " in caught.value.message
    path = work / "checkpoints" / "likes_good" / "failed_batch.json"
    assert str(path) in caught.value.message
    record = json.loads(path.read_text(encoding="utf-8"))
    assert len(record["pair_ids"]) == 4
    # A restart answers from the record: it trains no step, and says the same.
    path.unlink()
    with pytest.raises(NumericalError, match=re.escape(caught.value.message)):
        preference_loop(settings(hot, work, backbone))
    assert not path.exists()


def test_two_ray_train_workers_shard_one_model_and_agree_with_one(
    backbone: str, tmp_path: Path
) -> None:
    few = {"batch_size": 40, "num_epochs": 1}
    one = work_folder(tmp_path / "one")
    preference_loop(settings(config(**few), one, backbone))
    two = work_folder(tmp_path / "two")
    fit_preference_models(
        config(**few, workers_per_trial=2),
        two,
        {"likes_good": ["likes_good"]},
        backbone,
        lambda amount: None,
    )
    texts = [f"\n\nHuman: red\n\nAssistant: {word} sun" for word in ("good", "bad", "moon")]
    scores = [
        PreferenceModel.load(work / "models" / "likes_good").score(texts) for work in (one, two)
    ]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-3)


def test_trl_trains_inside_a_ray_train_worker(backbone: str, tmp_path: Path) -> None:
    work = work_folder(tmp_path / "work")
    trl = config(trainer="trl", loss="margin", batch_size=20, num_epochs=1)
    said: list[str] = []
    wanted = {"likes_good": ["likes_good"]}
    fit_preference_models(trl, work, wanted, backbone, lambda amount: None, said.append)
    good, bad = PreferenceModel.load(work / "models" / "likes_good").score(
        ["\n\nHuman: red\n\nAssistant: good", "\n\nHuman: red\n\nAssistant: bad"]
    )
    assert good > bad
    assert [line for line in said if "ties left out (hard labels cannot say equal)" in line]
    fit_preference_models(trl, work, wanted, backbone, lambda amount: None, said.append)
    assert len(said) == 1  # a finished training is not repeated, nor are its notes
