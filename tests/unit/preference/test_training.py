"""Training one preference model: it learns, and it resumes bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.errors import NumericalError
from morlaif_ray.preference import PreferenceModel
from morlaif_ray.preference.training import (
    TrainingData,
    TrainingStep,
    plan_batches,
    rate_factor,
    train_preference_model,
)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

HEADS = ("likes_good", "likes_red")


def make_data(num: int = 48) -> TrainingData:
    """Response a says good or bad, red or blue; each head's judge likes one word by 3 nats."""
    rng = np.random.default_rng(0)
    texts: list[list[str]] = [[], []]
    worth = np.zeros((2, num, 2))
    for row in range(num):
        for side in range(2):
            good, red = rng.random(2) < 0.5
            filler = " ".join(rng.choice(["sun", "moon", "star"], rng.integers(1, 9)))
            words = f"{'good' if good else 'bad'} {filler} {'red' if red else 'blue'}"
            texts[side].append(f"\n\nHuman: green\n\nAssistant: {words}")
            worth[side, row] = 3.0 * good, 3.0 * red
    log_odds = worth[0] - worth[1]
    log_odds[::7, 1] = np.nan
    return TrainingData(texts[0], texts[1], log_odds, [f"pair{i:03d}" for i in range(num)])


DATA = make_data()
CONFIG = PreferenceConfig(batch_size=8, num_epochs=2, learning_rate=2e-3, warmup_steps=2)


class Killed(Exception):
    """Stands for a process that dies."""


def train(
    path: str,
    folder: Path,
    config: PreferenceConfig = CONFIG,
    *,
    die_after: int = 0,
    data: TrainingData = DATA,
) -> tuple[PreferenceModel, list[TrainingStep]]:
    model = PreferenceModel.from_backbone(path, HEADS, max_length=24, seed=3, lora=config.lora)

    def on_step(done: int, _: int) -> None:
        if done == die_after:
            raise Killed

    history = train_preference_model(
        model, data, config, seed=9, checkpoint_dir=folder, checkpoint_every=5, on_step=on_step
    )
    return model, history


def assert_identical(left: PreferenceModel, right: PreferenceModel) -> None:
    other = right.model.state_dict()
    for name, value in left.model.state_dict().items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("kind", "dropout", "lora"),
    [
        ("gpt2", 0.0, None),
        ("gpt2", 0.1, None),
        ("llama", 0.0, None),
        ("gpt2", 0.1, LoraConfig(rank=2, dropout=0.1)),
    ],
    ids=["plain", "dropout", "llama", "lora_dropout"],
)
def test_a_killed_training_ends_with_the_same_bits(
    backbone: Callable[..., str],
    tmp_path: Path,
    kind: str,
    dropout: float,
    lora: LoraConfig | None,
) -> None:
    path, config = backbone(kind, dropout), CONFIG.model_copy(update={"lora": lora})
    whole, expected = train(path, tmp_path / "whole", config)
    for death in (7, 11):  # after the checkpoints of step 5 and step 10; the second life dies, too
        with pytest.raises(Killed):
            train(path, tmp_path / "killed", config, die_after=death)
        torch.manual_seed(death)
    resumed, history = train(path, tmp_path / "killed", config)
    assert len(history) == 12
    assert history == expected
    assert_identical(resumed, whole)


def test_dropout_is_active_in_training_and_off_in_scoring(
    backbone: Callable[..., str], tmp_path: Path
) -> None:
    model, history = train(backbone("gpt2", 0.1), tmp_path / "a")
    _, plain = train(backbone("gpt2", 0.0), tmp_path / "b")
    assert [step.loss for step in history] != [step.loss for step in plain]
    np.testing.assert_array_equal(model.score_heads(DATA.texts_a), model.score_heads(DATA.texts_a))


def test_each_head_learns_its_own_principle(backbone: Callable[..., str], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"num_epochs": 14, "learning_rate": 5e-3})
    model, history = train(backbone(), tmp_path, config)
    difference = model.score_heads(DATA.texts_a) - model.score_heads(DATA.texts_b)
    for head in range(2):
        decided = np.nan_to_num(DATA.log_odds_NH[:, head]) != 0
        agree = difference[decided, head] * DATA.log_odds_NH[decided, head] > 0
        assert agree.mean() > 0.95
    assert history[-1].loss < 0.75 * history[0].loss  # ties keep it above 0
    assert not model.model.training


def test_gradient_checkpointing_changes_no_result(
    backbone: Callable[..., str], tmp_path: Path
) -> None:
    plain, _ = train(backbone(), tmp_path / "a")
    config = CONFIG.model_copy(update={"gradient_checkpointing": True})
    saving, _ = train(backbone(), tmp_path / "b", config)
    np.testing.assert_allclose(
        saving.score_heads(DATA.texts_a), plain.score_heads(DATA.texts_a), atol=1e-5
    )


def test_the_history_holds_one_record_per_step(
    backbone: Callable[..., str], tmp_path: Path
) -> None:
    _, history = train(backbone(), tmp_path)
    assert [step.step for step in history] == list(range(1, 13))
    expected = [2e-3 * rate_factor(step, 12, 2) for step in range(12)]
    assert [step.learning_rate for step in history] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_names_model_step_and_pairs(
    backbone: Callable[..., str], tmp_path: Path
) -> None:
    bad: Any = np.full_like(DATA.log_odds_NH, 1.0)
    data = TrainingData(DATA.texts_a, DATA.texts_b, bad, DATA.pair_ids)
    model = PreferenceModel.from_backbone(backbone(), HEADS, max_length=24, seed=3)
    with torch.no_grad():
        model.model.score.weight.fill_(float("inf"))
    with pytest.raises(
        NumericalError,
        match=r"'likes_good': loss is nan at step 0 \(pairs pair0.*, \.\.\.; all 8 in .*failed_batch\.json\)",
    ):
        train_preference_model(model, data, CONFIG, seed=0, checkpoint_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["failed_batch.json"]
    record = json.loads((tmp_path / "failed_batch.json").read_text(encoding="utf-8"))
    assert len(set(record["pair_ids"])) == 8
    assert set(record["pair_ids"]) < set(DATA.pair_ids)
    assert (record["step"], record["loss"]) == (0, "nan")


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(
    backbone: Callable[..., str], tmp_path: Path
) -> None:
    model = PreferenceModel.from_backbone(backbone(), HEADS, max_length=24, seed=3)
    before = model.model.score.weight.detach().clone()
    model.model.score.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(
        NumericalError, match=r"'likes_good': gradient is nan at step 0 \(pairs pair0"
    ):
        train_preference_model(model, DATA, CONFIG, seed=0, checkpoint_dir=tmp_path)
    assert torch.equal(model.model.score.weight, before)


@pytest.mark.parametrize(
    ("step", "num_steps", "warmup", "factor"),
    [
        (0, 100, 5, 0.2),
        (4, 100, 5, 1.0),
        (5, 100, 5, 1.0),
        (0, 100, 250, 0.1),  # a warm-up of 250 in a run of 100 becomes 10
        (55, 100, 10, 0.5),  # half-way down the cosine
        (0, 4, 0, 1.0),
        (3, 4, 0, 0.5 * (1.0 + np.cos(0.75 * np.pi))),
        (0, 1, 250, 1.0),
    ],
)
def test_the_learning_rate_by_hand(step: int, num_steps: int, warmup: int, factor: float) -> None:
    assert rate_factor(step, num_steps, warmup) == pytest.approx(factor)


def test_every_pair_is_met_once_per_epoch_beside_pairs_of_its_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 90, 333)
    batches = plan_batches(lengths, 16, 2, seed=4)
    assert len(batches) == 42
    for epoch in (batches[:21], batches[21:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(333))
    spread = np.mean([lengths[rows].max() - lengths[rows].min() for rows in batches])
    assert spread < 15  # of 85
    again = plan_batches(lengths, 16, 2, seed=4)
    assert all(np.array_equal(x, y) for x, y in zip(batches, again, strict=True))
    assert [b.tolist() for b in plan_batches(lengths, 16, 2, seed=5)] != [b.tolist() for b in again]
