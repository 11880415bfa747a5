"""The loop's own share of the learner's idle time: one step off, with actors that sleep instead of computing.

Learner and two rollout workers are Ray actors of the real loop (`run_arm`: real dispatch, object store, weight buckets,
log), each with seconds of its own, so that they do not fight for the processors of one machine. What the learner
idles here is what the loop makes it wait.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from actors.spawning import spawn
from actors.stored_rollouts import Arrays, StoredRollouts, Told, split
from benchmarks.ppo_workload import Workload
from morlaif_ray.artifacts import write_json
from morlaif_ray.rl.generation import SamplingSettings
from morlaif_ray.rl.weight_transfer import WeightBucket, in_buckets
from morlaif_ray.types import FloatArray, GenerationRequest, RolloutBatch, UpdateMetrics

UPDATE_S, GENERATE_S, SCORE_S, LOAD_S = 0.6, 0.3, 0.1, 0.1
"""Seconds of an update, of sampling one worker's share, of the panel, of a worker's loading new weights."""
WEIGHT_BYTES = 29_000_000 * 4


class SleepingLearner:
    """Answers what the loop asks of a learner after the time that it would take."""

    def __init__(self) -> None:
        self._step = 0
        self._weights = {"all": np.zeros(WEIGHT_BYTES // 4, dtype=np.float32)}

    def ping(self) -> int:
        return self._step

    def notes(self) -> list[str]:
        return []

    def loop_state(self) -> dict[str, Any]:
        return {}

    def update(
        self, batch: StoredRollouts, reward_B: FloatArray, scores: dict[str, FloatArray]
    ) -> dict[str, float]:
        batch.fetch(60.0)
        time.sleep(UPDATE_S)
        self._step += 1
        names = [field.name for field in dataclasses.fields(UpdateMetrics)]
        return dataclasses.asdict(UpdateMetrics(**dict.fromkeys(names, 0.0)))

    def weight_buckets(self, max_bytes: int) -> Iterator[WeightBucket]:
        yield from in_buckets(self._weights, self._step, max_bytes)

    def save_model(self, folder: str) -> None: ...


class SleepingWorker:
    def __init__(self) -> None:
        self._version = 0

    def ping(self) -> int:
        return self._version

    def generate_stored(
        self, requests: Sequence[GenerationRequest], settings: SamplingSettings
    ) -> tuple[Told, Arrays]:
        time.sleep(GENERATE_S)
        num, length = len(requests), settings.max_new_tokens
        lengths = np.full(num, length)
        return split(
            RolloutBatch(
                prompts=tuple(request.prompt for request in requests),
                responses=("a response",) * num,
                tokens_BL=np.zeros((num, 2 * length), dtype=np.int64),
                prompt_lengths_B=lengths,
                response_lengths_B=lengths,
                logprobs_BT=np.zeros((num, length), dtype=np.float32),
                truncated_B=np.zeros(num, dtype=np.bool_),
                policy_version=self._version,
            )
        )

    def load_buckets(self, version: int, *buckets: WeightBucket) -> int:
        for index, bucket in enumerate(buckets):
            bucket.verified(version, index)
        time.sleep(LOAD_S)
        self._version = version
        return version


class SleepingPanel:
    def submit(self, texts: Sequence[str], columns: Sequence[str], missing: str) -> Any:
        scores = np.random.default_rng(len(texts)).normal(size=(len(texts), len(columns)))

        def result() -> Any:
            time.sleep(SCORE_S)
            return SimpleNamespace(scores_BK=scores)

        return SimpleNamespace(result=result)


class NoBar:
    def advance(self, amount: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


def simulated_idle_share(workload: Workload, num_steps: int) -> float:
    """Median over the steps, the first two not counted. The workload's config must be one step off."""
    import ray

    from jobs.arm import Arm
    from jobs.context import open_run
    from jobs.progress import Reporter
    from jobs.tracking import PrometheusGauges
    from jobs.train_policy import run_arm

    context = open_run(workload.config, workload.folder, Reporter(quiet=True))
    context.connect()
    stack = ExitStack()
    stack.callback(ray.shutdown)
    arm_config = context.config.policy.arms[0].model_copy(update={"num_steps": num_steps})
    work = context.path("work", "5_policy", "simulated")
    (work / "model").mkdir(parents=True)
    write_json(work / "model" / "config.json", {})
    with stack:
        for name, made in (
            ("jobs.arm.spawn_ppo_learner", SleepingLearner),
            ("actors.rollout_pool.spawn_rollout_worker", SleepingWorker),
        ):
            stack.enter_context(mock.patch(name, _spawner(made)))
        panel: Any = SleepingPanel()
        arm = Arm(context, arm_config, work, panel)
        run_arm(arm, NoBar(), PrometheusGauges(), threading.Event())
    log = Path(context.path("timings", f"policy-{arm_config.name}.jsonl"))
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return statistics.median(row["learner_idle_share"] for row in rows[2:])


def _spawner(plain_class: type[Any]) -> Any:
    def make(*_: Any, **__: Any) -> Any:
        return spawn(plain_class, num_cpus=0.1, num_gpus=0)

    return make
