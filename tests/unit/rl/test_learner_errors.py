"""What a learner cannot learn from ends in one line, before it changes a weight."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from morlaif_ray.backbone import load_tokenizer
from morlaif_ray.errors import ArtifactError, NumericalError
from morlaif_ray.rl import PPOLearner
from morlaif_ray.types import RolloutBatch
from tests.unit.rl.slow_ppo import CONFIG, REWARDS

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


def test_a_reward_that_is_not_finite_names_step_and_row(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    learner = PPOLearner(gpt2, CONFIG, seed=0)
    with pytest.raises(NumericalError, match="PPO step 0: reward 2 is not finite"):
        learner.update(batch(0), np.array([0.0, 1.0, np.nan, 0.0, 0.0, np.inf]))
    assert learner.step == 0
    assert learner.reward_scale.count == 0


def test_samples_that_cannot_be_learned_are_written_to_the_file_that_the_error_names(
    gpt2: str, batch: Callable[..., RolloutBatch], tmp_path: Path
) -> None:
    made = dataclasses.replace(batch(0), prompts=tuple("abcdef"), responses=tuple("uvwxyz"))
    learner = PPOLearner(gpt2, CONFIG, seed=0, failure_dir=tmp_path / "arm")
    rewards = np.array([0.0, 1.0, np.nan, 0.0, 0.0, np.inf])
    scores = {"helpfulness": np.array([0.5, 0.5, np.nan, 0.5, 0.5, 2.0])}
    with pytest.raises(NumericalError) as caught:
        learner.update(made, rewards, scores)
    path = tmp_path / "arm" / "not_finite_step_0.jsonl"
    assert str(caught.value).endswith(f"reward 2 is not finite; the samples are in {path}")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["row"], r["prompt"], r["response"]) for r in records] == [
        (2, "c", "w"),
        (5, "f", "z"),
    ]
    assert math.isnan(records[0]["reward"])
    assert records[1]["scores"] == {"helpfulness": 2.0}


def test_a_gradient_that_overflows_stops_before_it_changes_a_weight(
    gpt2: str, batch: Callable[..., RolloutBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = PPOLearner(gpt2, CONFIG, seed=0, failure_dir=tmp_path)
    before = {name: value.copy() for name, value in learner.weights().items()}
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(float("inf"))
    )
    with pytest.raises(NumericalError, match=r"the gradient is not finite; lower policy\.learning"):
        learner.update(batch(0), REWARDS[0])
    for name, value in learner.weights().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    records = (tmp_path / "not_finite_step_0.jsonl").read_text().splitlines()
    assert len(records) == 3  # no single row stands out: the whole minibatch


def test_a_loss_that_is_not_finite_ends_the_run(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    learner = PPOLearner(gpt2, CONFIG, seed=0)
    with torch.no_grad():
        learner.policy.model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(NumericalError, match=r"PPO step 0: the loss is nan; lower policy.learning"):
        learner.update(batch(0), REWARDS[0])


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(
    gpt2: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt2, folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["comet"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ArtifactError, match=r"model: the tokenizer has 12 tokens and the model only 11"
    ):
        PPOLearner(str(folder), CONFIG, seed=0)
