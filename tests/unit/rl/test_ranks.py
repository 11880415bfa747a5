"""Two gloo ranks do what one rank does: weights, metrics, checkpoints; whole or sharded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.rl import PPOLearner
from morlaif_ray.rl.ranks import Ranks, _buckets
from tests import rank_processes
from tests.ports import free_port
from tests.unit.rl import rank_worker
from tests.unit.rl.conftest import make_batch
from tests.unit.rl.rank_worker import SEED, rewards_of

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # PEFT, about GPT-2's Conv1D
]

WAIT_S = 240.0
CONFIG = {
    "batch_size": 7,  # an odd number: the ranks' shares differ
    "num_minibatches": 1,
    "num_epochs": 2,
    "microbatch_size": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "kl_coefficient": 0.2,
}


def run_two(folder: Path, **job: Any) -> list[tuple[dict[str, Any], list[dict[str, float]]]]:
    """Weights and metrics of both ranks."""
    folder.mkdir(exist_ok=True)
    job_file = folder / "job.json"
    address = f"127.0.0.1:{free_port()}"
    job_file.write_text(
        json.dumps({"size": 2, "address": address, "out": str(folder), "restore": False, **job})
    )
    logs = [folder / f"rank_{rank}.log" for rank in range(2)]
    arguments = [(str(job_file), rank) for rank in range(2)]
    rank_processes.run(rank_worker.main, arguments, logs, WAIT_S)
    return [
        (
            dict(np.load(folder / f"weights_{rank}.npz")),
            json.loads((folder / f"metrics_{rank}.json").read_text()),
        )
        for rank in range(2)
    ]


def one_rank(path: str, changes: dict[str, Any], num_steps: int) -> tuple[PPOLearner, list[Any]]:
    learner = PPOLearner(path, PolicyConfig(**{**CONFIG, **changes}), seed=SEED)
    metrics = []
    for step in range(num_steps):
        size = learner.config.batch_size
        metrics.append(
            dataclasses.asdict(learner.update(make_batch(step, size), rewards_of(step, size)))
        )
    return learner, metrics


def assert_close(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        if not name.endswith("c_attn.bias"):  # key biases: no gradient but rounding noise
            np.testing.assert_allclose(value, right[name], atol=2e-5, err_msg=name)


VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "kept_forward": {"microbatch_size": 64},  # the evaluation is the first forward pass
    "critic": {"separate_critic": True, "num_minibatches": 1},
    "sharded": {"fsdp": True},
    "sharded_lora": {"fsdp": True, "lora": {"rank": 3, "alpha": 6}},
    "sharded_lora_checkpointed": {
        "fsdp": True,
        "lora": {"rank": 2},
        "gradient_checkpointing": True,
    },
    "grpo": {"advantage": "grpo", "samples_per_prompt": 2, "batch_size": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one(gpt2: str, tmp_path: Path, variant: str) -> None:
    changes = VARIANTS[variant]
    plain = {key: value for key, value in changes.items() if key != "fsdp"}
    learner, expected = one_rank(gpt2, plain, 2)
    config = {**CONFIG, **changes, "learner_ranks": 2}
    checkpoint = str(tmp_path / "checkpoint")
    made = run_two(
        tmp_path / "two", model=gpt2, config=config, start=0, stop=2, checkpoint=checkpoint
    )
    (weights, metrics), (other_weights, other_metrics) = made
    for name, value in weights.items():
        np.testing.assert_array_equal(value, other_weights[name], err_msg=name)
    np.testing.assert_equal(metrics, other_metrics)
    assert_close(weights, learner.weights())
    for got, wanted in zip(metrics, expected, strict=True):
        for name, value in wanted.items():
            assert got[name] == pytest.approx(value, rel=1e-3, abs=2e-5, nan_ok=True), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")
    assert_close({n: p.detach().numpy() for n, p in saved.named_parameters()}, weights)
    # A checkpoint knows nothing of ranks: one rank goes on from it.
    single = PPOLearner(gpt2, PolicyConfig(**{**CONFIG, **plain}), seed=SEED)
    assert single.load_checkpoint(Path(checkpoint))
    assert single.step == 2
    for name, value in single.weights().items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)


@pytest.mark.parametrize("variant", ["whole", "sharded", "sharded_lora"])
def test_two_ranks_resume_to_the_same_bits(gpt2: str, tmp_path: Path, variant: str) -> None:
    config = {**CONFIG, **VARIANTS[variant], "learner_ranks": 2}

    def run(name: str, start: int, stop: int, checkpoint: str, restore: bool) -> dict[str, Any]:
        made = run_two(
            tmp_path / name,
            model=gpt2,
            config=config,
            start=start,
            stop=stop,
            checkpoint=str(tmp_path / checkpoint),
            restore=restore,
        )
        return made[0][0]

    whole = run("whole", 0, 3, "checkpoint_whole", False)
    run("first", 0, 1, "checkpoint", False)
    resumed = run("second", 1, 3, "checkpoint", True)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)


@pytest.mark.parametrize("variant", ["sharded", "sharded_lora"])
def test_sharded_ranks_hold_bfloat16_beside_a_float32_value_head(
    model_path: Callable[[str], str], tmp_path: Path, variant: str
) -> None:
    made = run_two(
        tmp_path / "two",
        model=model_path("llama_untied"),
        config={**CONFIG, **VARIANTS[variant], "learner_ranks": 2},
        dtype="bfloat16",
        start=0,
        stop=1,
        checkpoint=str(tmp_path / "checkpoint"),
    )
    (weights, metrics), (other_weights, _) = made
    for name, value in weights.items():
        np.testing.assert_array_equal(value, other_weights[name], err_msg=name)
    assert metrics[0]["grad_norm"] > 0.0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")
    assert saved.dtype == torch.bfloat16
    for name, parameter in saved.named_parameters():
        np.testing.assert_array_equal(parameter.detach().float().numpy(), weights[name])


def test_buckets_are_of_bounded_size_and_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("morlaif_ray.rl.ranks.BUCKET_BYTES", 100)
    sizes = [10, 10, 10, 40, 5, 5]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    parameters[-1] = torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    made = [[p.numel() for p in bucket] for bucket in _buckets(parameters)]
    assert made == [[10, 10], [10], [40], [5], [5]]


def test_one_rank_sends_nothing(batch: Callable[..., Any]) -> None:
    values = torch.tensor([1.0, 2.0])
    assert Ranks().add_up(values) is values
    Ranks().add_up_gradients([torch.nn.Parameter(values)])
    assert not torch.distributed.is_initialized()
