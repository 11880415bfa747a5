"""Preference training on two CPU ranks (gloo, FSDP2): the result of one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morlaif_ray.config import parse_config
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.errors import ConfigError
from morlaif_ray.preference import PreferenceModel
from morlaif_ray.preference.sharding import current_ranks, whole_weights
from morlaif_ray.preference.stepping import _share_of
from morlaif_ray.preference.training import TrainingData, train_preference_model
from tests.ports import free_port

pytestmark = [pytest.mark.unit, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]
HEADS = ("good", "red")
# 27 pairs in batches of 8 leave one of 3: ranks with unequal shares.
CONFIG = PreferenceConfig(
    batch_size=8, microbatch_size=3, num_epochs=2, learning_rate=2e-3, checkpoint_every=3
)


def make_data(num: int = 27) -> TrainingData:
    rng = np.random.default_rng(5)
    words = ["good", "bad", "red", "blue", "sun", "moon"]
    texts = [
        f"\n\nHuman: green\n\nAssistant: {' '.join(rng.choice(words, rng.integers(1, 8)))}"
        for _ in range(2 * num)
    ]
    odds = rng.normal(0.0, 2.0, (num, 2))
    odds[::4, 1] = np.nan
    return TrainingData(texts[:num], texts[num:], odds, [f"pair{i:02d}" for i in range(num)])


def train(path: str, folder: Path, lora: bool, die_after: int = 0) -> tuple[Any, list[float]]:
    config = CONFIG.model_copy(update={"lora": LoraConfig(rank=2, dropout=0.0) if lora else None})
    model = PreferenceModel.from_backbone(path, HEADS, max_length=24, seed=3, lora=config.lora)

    def on_step(done: int, _: int) -> None:
        if done == die_after:
            raise KeyboardInterrupt

    history = train_preference_model(
        model, make_data(), config, seed=9, checkpoint_dir=folder, on_step=on_step
    )
    return model, [item.loss for item in history]


def rank_process(rank: int, port: int, path: str, folder: str, lora: bool) -> None:
    """One rank: trains whole, then dies after a checkpoint and resumes; rank 0 leaves its weights."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    model, losses = train(path, Path(folder, "whole"), lora)
    assert any(
        type(p).__name__ == "DTensor" or hasattr(p, "full_tensor") for p in model.model.parameters()
    )
    weights = whole_weights(model)
    try:
        train(path, Path(folder, "killed"), lora, die_after=5)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("it should have died")
    if lora and rank == 0:  # as a kill between the two renames of a later checkpoint leaves it
        Path(folder, "killed", "checkpoint").rename(Path(folder, "killed", ".checkpoint.old"))
    torch.distributed.barrier()
    resumed, again = train(path, Path(folder, "killed"), lora)
    resumed_weights = whole_weights(resumed)
    if rank == 0:
        torch.save(
            {"weights": weights, "resumed": resumed_weights, "losses": [losses, again]},
            Path(folder, "result.pt"),
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_ranks_end_with_the_weights_of_one(
    backbone: Callable[..., str], tmp_path: Path, lora: bool
) -> None:
    assert current_ranks().size == 1
    model, losses = train(backbone(), tmp_path / "one", lora)
    # Not multiprocessing: its children cannot import a test module that pytest loaded by path.
    arguments = [str(free_port()), backbone(), str(tmp_path), "lora" if lora else "full"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), *arguments], env=environment, cwd=tmp_path
        )
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    np.testing.assert_allclose(result["losses"][0], losses, rtol=1e-5)
    assert result["losses"][1] == result["losses"][0]
    expected = model.model.state_dict()
    assert set(result["weights"]) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(result["weights"][name], value, atol=2e-4, rtol=1e-3)
        assert torch.equal(result["resumed"][name], result["weights"][name]), name


def test_shares_of_ranks_are_equally_long_and_hold_every_row_once() -> None:
    rows = np.array([5, 3, 9])
    assert _share_of(rows, 0, 2).tolist() == [5, 9]
    assert _share_of(rows, 1, 2).tolist() == [3, -1]  # -1: no pair
    assert _share_of(rows, 0, 1).tolist() == [5, 3, 9]


def test_trl_trains_in_one_process() -> None:
    settings = {"trainer": "trl", "loss": "margin", "workers_per_trial": 2}
    with pytest.raises(
        ConfigError, match="trains in one process, but workers_per_trial is 2; write 1"
    ):
        parse_config({"preference": settings}, "here")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_tokens_per_batch": 4096},
            "train_tokens_per_batch gives its workers unequal numbers of forwards, so they would wait for each other; "
            "leave it out, or write workers_per_trial: 1",
        ),
        (
            {"last_block_at_end": True},
            "last_block_at_end passes by the blocks that are sharded over its workers; write last_block_at_end: false",
        ),
    ],
)
def test_several_workers_must_compute_in_step(settings: dict[str, Any], message: str) -> None:
    assert parse_config({"preference": settings}, "here").preference.workers_per_trial == 1
    with pytest.raises(ConfigError) as caught:
        parse_config({"preference": {**settings, "workers_per_trial": 2}}, "here")
    assert f"workers_per_trial is 2, and {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


if __name__ == "__main__":
    rank_process(
        int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5] == "lora"
    )
    # Results are on the disk. After FSDP2 gloo threads outlive the process group (torch 2.13) and now and then abort
    # the interpreter's exit; actors never come there, Ray ends them.
    os._exit(0)
