"""N updates = k updates + checkpoint + a fresh learner + N-k updates, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.errors import ArtifactError
from morlaif_ray.rl import PPOLearner
from morlaif_ray.types import RolloutBatch

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

CONFIG = PolicyConfig(
    batch_size=6,
    num_minibatches=2,
    num_epochs=2,
    microbatch_size=2,
    learning_rate=1e-3,
    warmup_steps=3,
    weight_decay=0.1,
    kl_horizon=50.0,
    gae_lambda=0.9,
)


def steps(learner: PPOLearner, numbers: range, batch: Callable[..., RolloutBatch]) -> list[Any]:
    made = []
    for number in numbers:
        rewards = np.random.default_rng(100 + number).normal(2.0, 3.0, 6)
        made.append(learner.update(batch(number), rewards))
    return made


def everything(learner: PPOLearner) -> dict[str, Any]:
    """Every tensor and number that the next step depends on."""
    state = {f"policy.{name}": value for name, value in learner.policy.state_dict().items()}
    for index, entry in learner.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{key}": value for key, value in entry.items()}
    state["kl"] = learner.kl_controller.coefficient
    state["scale"] = learner.reward_scale
    state["step"] = learner.step
    return state


def assert_identical(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right[name]), name
        else:
            assert value == right[name], name


VARIANTS = {
    "gpt2": ("gpt2", {}),
    "llama_tied": ("llama_tied", {}),
    "critic": ("gpt2", {"separate_critic": True}),
    "lora": ("gpt2", {"lora": LoraConfig(rank=2)}),
    "lora_critic": ("llama_untied", {"lora": LoraConfig(rank=2), "separate_critic": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_updates_are_two_and_two(
    model_path: Callable[[str], str],
    batch: Callable[..., RolloutBatch],
    tmp_path: Path,
    variant: str,
) -> None:
    kind, changes = VARIANTS[variant]
    path, config = model_path(kind), CONFIG.model_copy(update=changes)
    whole = PPOLearner(path, config, seed=7)
    expected = steps(whole, range(4), batch)

    first = PPOLearner(path, config, seed=7)
    steps(first, range(2), batch)
    first.save_checkpoint(tmp_path / "checkpoint")
    saved = everything(first)
    torch.manual_seed(999)  # a new process has another global generator
    second = PPOLearner(path, config, seed=7)
    assert second.load_checkpoint(tmp_path / "checkpoint")
    assert_identical(everything(second), saved)
    resumed = steps(second, range(2, 4), batch)

    assert_identical(everything(second), everything(whole))
    assert resumed == expected[2:]


def test_equal_seeds_give_equal_bits_and_other_seeds_other_minibatches(
    gpt2: str, batch: Callable[..., RolloutBatch]
) -> None:
    def after(seed: int) -> dict[str, Any]:
        learner = PPOLearner(gpt2, CONFIG, seed=seed)
        steps(learner, range(2), batch)
        return everything(learner)

    first = after(1)
    assert_identical(first, after(1))
    other = after(2)
    assert not torch.equal(first["policy.value_head.weight"], other["policy.value_head.weight"])


def rewarded(
    learner: PPOLearner, number: int, mean: float, batch: Callable[..., RolloutBatch]
) -> None:
    learner.update(batch(number), np.linspace(mean - 1, mean + 1, 6))


def kept(folder: Path) -> set[str]:
    return {entry.name for entry in folder.parent.iterdir()}


def test_the_newest_checkpoints_and_the_one_of_the_highest_reward_are_kept(
    gpt2: str, batch: Callable[..., RolloutBatch], tmp_path: Path
) -> None:
    learner, folder = PPOLearner(gpt2, CONFIG, seed=0), tmp_path / "deep" / "checkpoint"
    for number, reward in enumerate([0.0, 5.0, 1.0, 2.0, 3.0]):
        rewarded(learner, number, reward, batch)
        learner.save_checkpoint(folder)
    assert kept(folder) == {"checkpoint", "checkpoint.00000004", "checkpoint.00000002"}
    fresh = PPOLearner(gpt2, CONFIG, seed=0)
    fresh.load_checkpoint(folder)
    assert fresh.step == 5
    rewarded(learner, 5, 9.0, batch)
    learner.save_checkpoint(folder)
    assert kept(folder) == {"checkpoint", "checkpoint.00000005"}


def test_the_reward_of_a_checkpoint_is_the_mean_since_the_one_before(
    gpt2: str, batch: Callable[..., RolloutBatch], tmp_path: Path
) -> None:
    learner, folder = PPOLearner(gpt2, CONFIG, seed=0), tmp_path / "checkpoint"
    for number, reward in enumerate([1.0, 3.0, 7.0]):
        rewarded(learner, number, reward, batch)
        if number:
            learner.save_checkpoint(folder)
            stored = json.loads((folder / "state.json").read_text())["reward"]
            assert stored == pytest.approx({1: 2.0, 2: 7.0}[number])


def test_a_kill_between_the_two_renames_loses_nothing(gpt2: str, tmp_path: Path) -> None:
    learner, folder = PPOLearner(gpt2, CONFIG, seed=0), tmp_path / "checkpoint"
    learner.step = 5
    learner.save_checkpoint(folder)
    folder.rename(tmp_path / "checkpoint.00000005")  # what such a kill leaves behind
    (tmp_path / ".checkpoint.partial").mkdir()
    fresh = PPOLearner(gpt2, CONFIG, seed=0)
    assert fresh.load_checkpoint(folder)
    assert fresh.step == 5
    fresh.step = 6
    fresh.save_checkpoint(folder)
    assert fresh.load_checkpoint(folder)
    assert fresh.step == 6


def test_without_a_checkpoint_the_learner_starts_anew(gpt2: str, tmp_path: Path) -> None:
    learner = PPOLearner(gpt2, CONFIG, seed=0)
    assert not learner.load_checkpoint(tmp_path / "checkpoint")
    assert learner.step == 0


def cut_short(folder: Path) -> None:
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def one_bit(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def without_optimizer(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


def broken_json(folder: Path) -> None:
    (folder / "state.json").write_text("{", encoding="utf-8")


DAMAGES = [cut_short, without_optimizer, broken_json, without_manifest, one_bit]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    gpt2: str, batch: Callable[..., RolloutBatch], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    learner, folder = PPOLearner(gpt2, CONFIG, seed=0), tmp_path / "checkpoint"
    steps(learner, range(1), batch)
    learner.save_checkpoint(folder)
    damage(folder)
    with pytest.raises(ArtifactError, match=r"damaged checkpoint \(.*\); remove it") as caught:
        PPOLearner(gpt2, CONFIG, seed=0).load_checkpoint(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used_and_said(
    gpt2: str, batch: Callable[..., RolloutBatch], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    whole = PPOLearner(gpt2, CONFIG, seed=0)
    steps(whole, range(3), batch)
    learner, folder = PPOLearner(gpt2, CONFIG, seed=0), tmp_path / "checkpoint"
    for number in range(2):
        steps(learner, range(number, number + 1), batch)
        learner.save_checkpoint(folder)
    damage(folder)
    fresh = PPOLearner(gpt2, CONFIG, seed=0)
    assert fresh.load_checkpoint(folder)
    assert fresh.step == 1
    assert len(fresh.notes) == 1
    assert fresh.notes[0].startswith(f"{folder}: damaged checkpoint (")
    assert fresh.notes[0].endswith("going on from checkpoint.00000001")
    steps(fresh, range(1, 2), batch)
    fresh.save_checkpoint(folder)  # beside what the damaged one left
    again = PPOLearner(gpt2, CONFIG, seed=0)
    assert again.load_checkpoint(folder)
    assert again.notes == []
    steps(again, range(2, 3), batch)
    assert_identical(everything(again), everything(whole))


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({"learning_rate": 2e-3}, 0, "policy.learning_rate was 0.001, now 0.002"),
        ({"lora": LoraConfig(rank=2)}, 0, "policy.lora was None, now {"),
        ({}, 4, "seed was 0, now 4"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_in_one_line(
    gpt2: str, tmp_path: Path, changes: dict[str, Any], seed: int, message: str
) -> None:
    folder = tmp_path / "checkpoint"
    PPOLearner(gpt2, CONFIG, seed=0).save_checkpoint(folder)
    other = PPOLearner(gpt2, CONFIG.model_copy(update=changes), seed=seed)
    with pytest.raises(ArtifactError) as caught:
        other.load_checkpoint(folder)
    assert str(caught.value).startswith(f"{folder}: checkpoint of another config ({message}")
    assert "\n" not in str(caught.value)


def test_what_changes_speed_alone_does_not_make_a_checkpoint_foreign(
    gpt2: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    PPOLearner(gpt2, CONFIG, seed=0).save_checkpoint(folder)
    changes = {"microbatch_size": 3, "num_steps": 7, "keep_checkpoints": 5, "max_restarts": 9}
    assert PPOLearner(gpt2, CONFIG.model_copy(update=changes), seed=0).load_checkpoint(folder)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(
    gpt2: str, model_path: Callable[[str], str], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    PPOLearner(gpt2, CONFIG, seed=0).save_checkpoint(folder)
    with pytest.raises(ArtifactError, match=r"checkpoint of another model \(tensor 'model\."):
        PPOLearner(model_path("llama_tied"), CONFIG, seed=0).load_checkpoint(folder)


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(
    gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    learner, folder = PPOLearner(gpt2, CONFIG, seed=0), tmp_path / "checkpoint"
    learner.step = 3
    learner.save_checkpoint(folder)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("morlaif_ray.rl.checkpoints.save_file", full)
    learner.step = 4
    with pytest.raises(ArtifactError, match="the disk is full; free some space"):
        learner.save_checkpoint(folder)
    assert learner.load_checkpoint(folder)
    assert learner.step == 3
