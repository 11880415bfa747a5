"""vLLM engines in Ray actors behind the rollout pool: two workers, new weights, one that dies and one that hangs."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.ppo_learner import spawn_ppo_learner
from actors.rollout_pool import RolloutPool, weights_reference
from actors.weight_exchange import fetch_buckets
from morlaif_ray.config import Config
from morlaif_ray.config.learning import PolicyConfig, VllmConfig
from morlaif_ray.rl.generation import SamplingSettings
from morlaif_ray.types import RolloutBatch
from tests.processes import WAIT_S, kill, pid_of, wait_until_gone
from tests.vllm.tiny_models import largest_gap, make_model, requests, weights_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
SETTINGS = SamplingSettings(max_new_tokens=12, stop=("\n\nHuman:",))
CONFIG = Config(
    policy=PolicyConfig(
        engine="vllm", max_restarts=5, samples_per_prompt=2, vllm=VllmConfig(kv_cache_mb=32)
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts") / "model"
    make_model("gpt2", folder)
    return folder


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[RolloutPool]:
    pool = RolloutPool(CONFIG, str(folder), 2, lambda text: None)
    yield pool
    pool.close()


def assert_same(batch: RolloutBatch, expected: RolloutBatch) -> None:
    assert batch.responses == expected.responses
    assert batch.policy_version == expected.policy_version
    np.testing.assert_array_equal(batch.tokens_BL, expected.tokens_BL)
    np.testing.assert_array_equal(batch.logprobs_BT, expected.logprobs_BT)


def test_prompts_are_spread_over_the_workers_and_come_back_in_order(pool: RolloutPool) -> None:
    import ray

    asked = requests(40)
    batch = pool.generate(asked, SETTINGS)
    assert batch.prompts == tuple(request.prompt for request in asked)
    assert len(pool._parts(40)) == 20  # the two samples of a prompt travel together
    one = pool._workers[0].handle
    alone = ray.get(one.generate.remote(asked, SETTINGS), timeout=WAIT_S)
    assert alone.responses == batch.responses
    heard: list[tuple[int, int]] = []
    pool.generate(asked, SETTINGS, lambda first, part: heard.append((first, len(part))))
    assert sorted(heard) == [(row, 2) for row in range(0, 40, 2)]


def test_all_workers_hold_the_new_weights_and_a_killed_one_comes_back_with_them(
    pool: RolloutPool, tmp_path: Path
) -> None:
    other = make_model("gpt2", tmp_path / "other", seed=4)
    before = pool.generate(requests(40), SETTINGS)
    buckets = weights_reference(weights_of(other), 5, max_bytes=40_000)
    assert len(buckets) > 3
    pool.load_weights(buckets, 5)
    expected = pool.generate(requests(40), SETTINGS)
    assert expected.policy_version == 5
    assert largest_gap(other, expected, 1.0) < 1e-4
    assert before.responses != expected.responses
    for part in pool.generate_on_each(requests(6), SETTINGS):
        assert largest_gap(other, part, 1.0) < 1e-4

    kill(pool._workers[0].handle)
    assert_same(pool.generate(requests(40), SETTINGS), expected)
    assert pool._workers[0].num_restarts == 1


def test_a_stopped_engine_is_replaced_after_its_call_time_out(
    pool: RolloutPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pool.generate(requests(40), SETTINGS)
    restarts = [worker.num_restarts for worker in pool._workers]
    stopped = pool._workers[1]
    victim = pid_of(stopped.handle)
    # Only the stopped one has little time: its successor may be slow at first.
    monkeypatch.setattr(stopped, "_say", lambda _: setattr(stopped, "call_timeout_s", 600.0))
    stopped.call_timeout_s = 1.0
    os.kill(victim, signal.SIGSTOP)
    assert_same(pool.generate(requests(40), SETTINGS), expected)
    assert [worker.num_restarts for worker in pool._workers] == [restarts[0], restarts[1] + 1]
    wait_until_gone(victim)


def test_a_learner_sends_its_weights_to_all_workers_and_once_more_after_one_was_killed(
    folder: Path, tmp_path: Path
) -> None:
    """Four processes: rank 0 of the learner, and two engines behind one group (`policy.weight_transfer: gloo`)."""
    import ray

    changes = {"weight_transfer": "gloo", "learning_rate": 0.05, "batch_size": 12, "num_epochs": 1}
    policy = CONFIG.policy.model_copy(update=changes | {"weight_transfer_timeout_s": 60.0})
    learner = spawn_ppo_learner(
        str(folder), policy, seed=0, dtype="float32", checkpoint_dir=tmp_path / "checkpoint"
    )

    def answer(method: str, reference: Any) -> Any:
        return ray.get(reference, timeout=WAIT_S)

    def trained_batch() -> RolloutBatch:
        """What the workers sample now; the learner has learned from it, and gone on to the next version."""
        batch = pool.generate(requests(12), SETTINGS)
        assert gap_to_learner(batch) < 1e-4
        answer("update", learner.update.remote(batch, np.linspace(-1.0, 1.0, 12)))
        assert gap_to_learner(batch) > 1e-2
        return batch

    def gap_to_learner(batch: RolloutBatch) -> float:
        expected_BT = answer("logprobs", learner.logprobs.remote(batch))
        return float(np.abs(expected_BT - batch.logprobs_BT).max())

    pool = RolloutPool(CONFIG.model_copy(update={"policy": policy}), str(folder), 2, lambda _: None)
    try:
        assert trained_batch().policy_version == 0
        assert pool.send_weights(learner, 1, answer) is None
        for part in pool.generate_on_each(requests(12), SETTINGS):
            assert part.policy_version == 1
            assert gap_to_learner(part) < 1e-4
        kill(pool._workers[0].handle)  # it comes back with the learner's weights of this version
        assert trained_batch().policy_version == 1
        assert pool._workers[0].num_restarts == 1
        kill(pool._workers[1].handle)  # not noticed before the next transfer
        assert str(pool.send_weights(learner, 2, answer)).startswith("rollout worker 1: ")
        pool.load_weights(fetch_buckets(learner, 40_000, 2, WAIT_S), 2)
        assert trained_batch().policy_version == 2
        assert pool.send_weights(learner, 3, answer) is None  # all three are in a new group
        for part in pool.generate_on_each(requests(12), SETTINGS):
            assert part.policy_version == 3
            assert gap_to_learner(part) < 1e-4
    finally:
        pool.close()
        ray.kill(learner)


def slices_of(pool: RolloutPool) -> list[psutil.Process]:
    """The processes that hold the model of the pool's first engine, slice by slice."""
    children = psutil.Process(pid_of(pool._workers[0].handle)).children(recursive=True)
    return [child for child in children if "VLLM::" in " ".join(child.cmdline())]


def test_a_model_sliced_over_two_processes_survives_one_of_them_and_leaves_none(
    folder: Path, tmp_path: Path
) -> None:
    policy = CONFIG.policy.model_copy(
        update={"vllm": VllmConfig(kv_cache_mb=32, tensor_parallel_size=2)}
    )
    pool = RolloutPool(Config(policy=policy), str(folder), 1, lambda text: None)
    try:
        other = make_model("gpt2", tmp_path / "other", seed=4)
        pool.load_weights(weights_reference(weights_of(other), 5, max_bytes=40_000), 5)
        expected = pool.generate(requests(12), SETTINGS)
        assert largest_gap(other, expected, 1.0) < 1e-4
        first = slices_of(pool)
        assert len(first) == 2
        first[1].kill()
        for process in first:  # the other one does not outlive it
            wait_until_gone(process.pid)
        assert_same(pool.generate(requests(12), SETTINGS), expected)
        assert pool._workers[0].num_restarts == 1
        second = slices_of(pool)
        assert len(second) == 2
    finally:
        pool.close()
    for process in second:
        wait_until_gone(process.pid)
