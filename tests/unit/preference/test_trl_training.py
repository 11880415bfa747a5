"""TRL's RewardTrainer on the paper's recipe: our tokens, our steps, our folder."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.config import parse_config
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.errors import ConfigError, NumericalError, ResourceError
from morlaif_ray.preference import PreferenceModel
from morlaif_ray.preference.training import TrainingData, TrainingStep, train_preference_model
from morlaif_ray.preference.trl_training import preferred_first, train_with_trl

pytestmark = [pytest.mark.unit, pytest.mark.timeout(300)]

CONFIG = PreferenceConfig(
    trainer="trl",
    loss="margin",
    batch_size=8,
    num_epochs=2,
    learning_rate=2e-3,
    warmup_steps=2,
    checkpoint_every=4,
)
LORA = CONFIG.model_copy(update={"lora": LoraConfig(rank=2, dropout=0.0)})


def make_data(num: int = 48) -> TrainingData:
    """The judge likes "good" by 1 nat; no ties, so that both trainers see the same pairs."""
    rng = np.random.default_rng(0)
    texts: list[list[str]] = [[], []]
    odds = np.where(rng.random(num) < 0.5, 1.0, -1.0)
    for row in range(num):
        for side in range(2):
            word = "good" if (odds[row] > 0) == (side == 0) else "bad"
            # Longer than max_length now and then: cut, never dropped.
            filler = " ".join(rng.choice(["sun", "moon", "star", "red"], rng.integers(1, 24)))
            texts[side].append(f"\n\nHuman: green\n\nAssistant: {filler} {word}")
    return TrainingData(texts[0], texts[1], odds[:, None], [f"pair{i:03d}" for i in range(num)])


DATA = make_data()


def builder(path: str, config: PreferenceConfig = CONFIG) -> Callable[[], PreferenceModel]:
    return lambda: PreferenceModel.from_backbone(
        path, ["good"], max_length=24, seed=3, lora=config.lora
    )


def train(
    path: str, folder: Path, config: PreferenceConfig = CONFIG, **options: Any
) -> tuple[PreferenceModel, list[TrainingStep]]:
    return train_with_trl(
        builder(path, config), DATA, config, seed=9, checkpoint_dir=folder, **options
    )


@pytest.mark.parametrize("config", [CONFIG, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_trl_takes_the_steps_of_our_own_trainer(
    backbone: Callable[..., str], tmp_path: Path, kind: str, config: PreferenceConfig
) -> None:
    model, history = train(backbone(kind), tmp_path / "trl", config)
    own = builder(backbone(kind), config)()
    expected = train_preference_model(own, DATA, config, seed=9, checkpoint_dir=tmp_path / "own")
    assert history[0].loss == pytest.approx(expected[0].loss, rel=1e-6)
    assert [item.step for item in history] == [item.step for item in expected]
    np.testing.assert_allclose(
        [item.loss for item in history], [item.loss for item in expected], rtol=1e-4
    )
    np.testing.assert_allclose(model.score(DATA.texts_a), own.score(DATA.texts_a), atol=2e-3)


@pytest.mark.parametrize("config", [CONFIG, LORA], ids=["full", "lora"])
def test_it_learns_and_saves_the_folder_that_scoring_loads(
    backbone: Callable[..., str], tmp_path: Path, config: PreferenceConfig
) -> None:
    longer = config.model_copy(update={"num_epochs": 12, "learning_rate": 1e-2})
    model, history = train(backbone(), tmp_path / "work", longer)
    assert history[-1].loss < 0.7 * history[0].loss
    model.save(tmp_path / "pm")
    loaded = PreferenceModel.load(tmp_path / "pm")
    np.testing.assert_array_equal(loaded.score(DATA.texts_a), model.score(DATA.texts_a))
    difference = loaded.score(DATA.texts_a) - loaded.score(DATA.texts_b)
    assert np.mean(difference * DATA.log_odds_NH[:, 0] > 0) > 0.95
    card = json.loads((tmp_path / "pm" / "preference_model.json").read_text(encoding="utf-8"))
    assert card["template"] == "dialogue-eos-v1"
    suffixes = {path.suffix for path in (tmp_path / "pm").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md"}


def test_a_pad_token_that_is_the_eos_token_changes_nothing(
    backbone: Callable[..., str], tmp_path: Path
) -> None:
    def build() -> PreferenceModel:
        model = builder(backbone())()
        model.tokenizer.pad_token = model.tokenizer.eos_token
        model.model.config.pad_token_id = model.tokenizer.eos_token_id
        return model

    plain, history = train(backbone(), tmp_path / "a")
    model, other = train_with_trl(build, DATA, CONFIG, seed=9, checkpoint_dir=tmp_path / "b")
    assert [step.loss for step in other] == pytest.approx([step.loss for step in history], rel=1e-5)
    np.testing.assert_allclose(model.score(DATA.texts_a), plain.score(DATA.texts_a), atol=1e-4)
    assert model.model.config.pad_token_id == model.tokenizer.eos_token_id


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_killed_training_ends_with_the_same_bits(
    backbone: Callable[..., str], tmp_path: Path, dropout: float
) -> None:
    class Killed(Exception): ...

    def die(done: int, _: int) -> None:
        if done == 7:
            raise Killed

    path = backbone("gpt2", dropout)
    whole, expected = train(path, tmp_path / "whole")
    with pytest.raises(Killed):
        train(path, tmp_path / "killed", on_step=die)
    (tmp_path / "killed" / "checkpoint-8").mkdir()  # a checkpoint cut off by the kill
    torch.manual_seed(123)
    resumed, history = train(path, tmp_path / "killed")
    assert history == expected
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_rows_are_hard_labels_with_margins_and_ties_are_counted(
    backbone: Callable[..., str],
) -> None:
    odds = np.array([[1.5], [-0.5], [0.0], [np.nan], [np.inf], [-np.inf]])
    texts_a = [
        f"\n\nHuman: red\n\nAssistant: {word}"
        for word in ("good", "bad", "sun", "moon", "star", "red")
    ]
    texts_b = ["\n\nHuman: red\n\nAssistant: blue"] * 6
    model = builder(backbone())()
    rows = preferred_first(model, TrainingData(texts_a, texts_b, odds, list("uvwxyz")))
    ids_a, (blue, *_) = model.encode(texts_a), model.encode(texts_b)
    assert rows.pair_ids == ["u", "v", "y", "z"]
    assert rows.margins == [1.5, 0.5, 0.0, 0.0]
    assert rows.chosen_ids == [ids_a[0], blue, ids_a[4], blue]
    assert rows.rejected_ids == [blue, ids_a[1], blue, ids_a[5]]
    assert {ids[-1] for ids in rows.chosen_ids} == {model.tokenizer.eos_token_id}
    assert rows.num_ties == 1


def test_a_loss_that_is_not_finite_names_the_pairs(
    backbone: Callable[..., str], tmp_path: Path
) -> None:
    def build() -> PreferenceModel:
        model = builder(backbone())()
        with torch.no_grad():
            model.model.score.weight.fill_(float("inf"))
        return model

    with pytest.raises(
        NumericalError, match=r"'good': loss is nan at step 0 \(pairs pair0.*all 8 in"
    ):
        train_with_trl(build, DATA, CONFIG, seed=9, checkpoint_dir=tmp_path)
    record = json.loads((tmp_path / "failed_batch.json").read_text(encoding="utf-8"))
    assert len(set(record["pair_ids"])) == 8


def test_out_of_memory_halves_the_micro_batch_and_changes_no_result(
    backbone: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import RewardTrainer

    whole, expected = train(backbone(), tmp_path / "a")
    original = RewardTrainer.compute_loss
    calls: list[int] = []

    def limited(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        size = len(inputs["input_ids"]) // 2
        if len(calls) >= 5 and size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        calls.append(size)
        return original(self, model, inputs, *rest, **options)

    monkeypatch.setattr(RewardTrainer, "compute_loss", limited)
    said: list[str] = []
    lives: list[weakref.ref[Any]] = []

    def build_alone() -> PreferenceModel:
        assert [life() for life in lives] == [None] * len(lives)  # never two models in memory
        model = builder(backbone())()
        lives.append(weakref.ref(model.model))
        return model

    parts, history = train_with_trl(
        build_alone, DATA, CONFIG, seed=9, checkpoint_dir=tmp_path / "b", say=said.append
    )
    assert len(lives) == 3
    assert [line.split("with ")[1][:7] for line in said] == ["4 pairs", "2 pairs"]
    np.testing.assert_allclose(
        [item.loss for item in history], [item.loss for item in expected], rtol=1e-4
    )
    np.testing.assert_allclose(parts.score(DATA.texts_a), whole.score(DATA.texts_a), atol=1e-3)
    monkeypatch.setattr(RewardTrainer, "compute_loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(backbone(), tmp_path / "c")

    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RewardTrainer, "compute_loss", never)
    with pytest.raises(ResourceError, match="a single pair does not fit into memory"):
        train(backbone(), tmp_path / "d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "trainer is 'trl', which has no soft labels; write loss: margin, or trainer: own"),
        (
            {"loss": "margin", "topology": "shared_trunk"},
            "trainer is 'trl', which trains one head, but topology is 'shared_trunk'; write topology: separate",
        ),
        (
            {"loss": "margin", "batch_size": 8, "microbatch_size": 3},
            "batch_size 8 is not a multiple of microbatch_size 3, as trainer 'trl' needs",
        ),
        (
            {"loss": "margin", "train_tokens_per_batch": 512},
            "trainer is 'trl', which knows no train_tokens_per_batch; remove train_tokens_per_batch, or write",
        ),
        (
            {"loss": "margin", "last_block_at_end": True},
            "trainer is 'trl', which knows no last_block_at_end; remove last_block_at_end, or write trainer: own",
        ),
    ],
)
def test_what_trl_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"preference": {"trainer": "trl", **changes}}, "here")
    assert message in caught.value.message
