"""One rank of a preference training, for a process of its own; and the training itself, for one rank alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.config.preferring import PreferenceConfig
from morlaif_ray.preference import PreferenceModel
from morlaif_ray.preference.sharding import whole_weights
from morlaif_ray.preference.training import TrainingData, train_preference_model

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
