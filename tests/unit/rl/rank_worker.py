"""One rank of a learner, for a process of its own: `main("job.json", rank)`. Leaves weights and metrics of its rank.

job.json: {model, config, size, address, start, stop, checkpoint, restore, out}.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.rl import PPOLearner
from morlaif_ray.rl.adapter_transfer import unpack
from morlaif_ray.rl.generation import TransformersEngine
from morlaif_ray.rl.ranks import join_ranks, leave_ranks
from tests.unit.rl.conftest import make_batch

SEED = 5


def rewards_of(step: int, num: int) -> np.ndarray:
    return np.random.default_rng(40 + step).normal(1.0, 2.0, num)


def assert_adapters_suffice(
    learner: PPOLearner, model: str, weights: dict[str, np.ndarray]
) -> None:
    """A worker with a base of its own gets the learner's bits from gathered adapters."""
    dtype = str(learner.policy.model.dtype).removeprefix("torch.")
    engine = TransformersEngine.from_path(model, dtype=dtype)
    adapters = unpack(learner.policy.sent_weights())
    engine.load_adapters(adapters, learner.policy.base_checksum, learner.step)
    for name, parameter in engine.model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().float(), weights[name], err_msg=name)


def main(job_file: str, rank: int) -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(job_file).read_text())
    config = PolicyConfig(**job["config"])
    ranks = join_ranks(rank, job["size"], job["address"], "cpu", 240.0)
    learner = PPOLearner(
        job["model"], config, seed=SEED, ranks=ranks, dtype=job.get("dtype", "float32")
    )
    if config.fsdp:  # the frozen base too
        assert all(isinstance(p, DTensor) for p in learner.policy.parameters())
    if job["restore"]:
        assert learner.load_checkpoint(Path(job["checkpoint"]))
    metrics = []
    for step in range(job["start"], job["stop"]):
        batch = make_batch(step, config.batch_size)
        metrics.append(
            dataclasses.asdict(learner.update(batch, rewards_of(step, config.batch_size)))
        )
    learner.save_checkpoint(Path(job["checkpoint"]))
    out = Path(job["out"])
    learner.save(out / "model")
    weights = learner.weights()
    if config.lora is not None:
        assert_adapters_suffice(learner, job["model"], weights)
    np.savez(out / f"weights_{rank}.npz", **weights)
    (out / f"metrics_{rank}.json").write_text(json.dumps(metrics))
    leave_ranks()
