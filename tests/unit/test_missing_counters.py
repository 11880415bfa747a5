"""Scores and missing ones are counted over the whole run: a checkpoint holds both numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs.arm_scoring import ArmScorer
from morlaif_ray.artifacts import write_json
from morlaif_ray.config.learning import ArmConfig, PolicyConfig, RewardConfig
from morlaif_ray.errors import ScalarizerError
from morlaif_ray.rl.learner import PPOLearner
from morlaif_ray.types import RolloutBatch
from tests.unit.rl.conftest import make_batch, model_path, tokenizer

__all__ = ["model_path", "tokenizer"]  # fixtures
pytestmark = pytest.mark.unit
NAMES = ("clarity", "honesty")


def scorer_in(folder: Path) -> ArmScorer:
    """Two principles, and at most a tenth of the scores may be missing."""
    moments = {name: {"mean": 0.0, "std": 1.0, "num": 9} for name in NAMES}
    weights = {name: {"weight": 1.0} for name in NAMES}
    card = {"principles": NAMES, "weights": weights, "normaliser": moments}
    write_json(folder / "weights.json", card)
    reward = RewardConfig(missing="renormalise", max_missing_share=0.1)
    config = SimpleNamespace(reward=reward, policy=PolicyConfig(), on_testbed=False)
    context: Any = SimpleNamespace(config=config, path=lambda *parts: folder / parts[-1])
    arm = ArmConfig(name="linear", scalarizer="linear")
    return ArmScorer(context, arm, SimpleNamespace())  # type: ignore[arg-type]


def scores(batch: RolloutBatch, num_missing: int) -> Any:
    raw = np.zeros((len(batch), len(NAMES)))
    raw[:num_missing, 0] = np.nan
    return raw


def test_a_resumed_run_counts_missing_scores_from_its_checkpoint_on(tmp_path: Path) -> None:
    batch = make_batch(0, num=6)
    before = scorer_in(tmp_path)
    for _ in range(4):
        before.score(batch, scores(batch, 0))
    before.score(batch, scores(batch, 2))
    assert before.state() == {"num_missing": 2, "num_scores": 60}
    resumed = scorer_in(tmp_path)
    resumed.restore(before.state())
    resumed.score(batch, scores(batch, 4))  # 6 of 72
    with pytest.raises(
        ScalarizerError, match="arm 'linear': 9 of 84 scores are missing, more than"
    ):
        resumed.score(batch, scores(batch, 3))
    forgetful = scorer_in(tmp_path)
    with pytest.raises(ScalarizerError, match="4 of 12 scores are missing"):
        forgetful.score(batch, scores(batch, 4))
    resumed.restore({})  # back at the start, where there is no checkpoint yet
    assert resumed.state() == {"num_missing": 0, "num_scores": 0}


def test_what_the_loop_keeps_comes_back_with_the_learners_own_step(
    model_path: Callable[[str], str], tmp_path: Path
) -> None:
    def learner() -> PPOLearner:
        return PPOLearner(model_path("gpt2"), PolicyConfig(batch_size=6, num_epochs=1), seed=1)

    first = learner()
    assert first.loop_state == {}
    for step in (1, 2):
        first.step = step
        first.save_checkpoint(tmp_path / "checkpoint", {"scores": {"num_scores": 12 * step}})
    newest = learner()
    assert newest.load_checkpoint(tmp_path / "checkpoint")
    assert newest.loop_state == {"scores": {"num_scores": 24}}
    (tmp_path / "checkpoint" / "manifest.json").unlink()
    older = learner()
    assert older.load_checkpoint(tmp_path / "checkpoint")
    assert (older.step, older.loop_state) == (1, {"scores": {"num_scores": 12}})
