"""The loop's own share of the learner's idle time: one step off, with actors that sleep instead of computing.

    python -m benchmarks.ppo_overlap [--steps 12]      # also the first half of `benchmarks.ppo --only overlap`

Learner and two rollout workers are Ray actors of the real loop (`run_arm`: real dispatch, object store, weight buckets,
log), each with seconds of its own, so that they do not fight for the processors of one machine. What the learner
idles here is what the loop makes it wait: by its own clock, from the end of an update to the begin of the next.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from actors.session import prepare_environment
from actors.spawning import spawn
from actors.stored_rollouts import Arrays, StoredRollouts, Told, split
from benchmarks.ppo_workload import TINY, Workload, make_workload
from morlaif_ray.artifacts import write_json
from morlaif_ray.rl.generation import SamplingSettings
from morlaif_ray.rl.weight_transfer import WeightBucket, in_buckets
from morlaif_ray.types import FloatArray, GenerationRequest, RolloutBatch, UpdateMetrics

UPDATE_S, GENERATE_S, SCORE_S, LOAD_S = 0.6, 0.3, 0.1, 0.1
"""Seconds of an update, of sampling one worker's share, of the panel, of a worker's loading new weights."""
WEIGHT_BYTES = 29_000_000 * 4


class SleepingLearner:
    """Answers what the loop asks of a learner after the time that it would take."""

    def __init__(self, clock: Path) -> None:
        """clock: the file for one row per update, as `Update`."""
        self._clock = clock
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
        begin, cpu_begin = time.monotonic(), time.process_time()
        batch.fetch(60.0)
        time.sleep(UPDATE_S)
        self._step += 1
        with self._clock.open("a", encoding="utf-8") as stream:
            row = [begin, time.monotonic(), cpu_begin, time.process_time()]
            stream.write(f"{json.dumps(row)}\n")
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
    """A progress bar that notes, in the loop's own thread, how much CPU time that thread has had after each step."""

    def __init__(self) -> None:
        self.cpu: list[float] = []

    def advance(self, amount: int = 1) -> None:
        self.cpu.append(time.thread_time())

    def note(self, text: str) -> None: ...


class Update(NamedTuple):
    """One update by the learner's own clock; seconds."""

    begin: float
    end: float
    cpu_begin: float
    """CPU time that the process has had."""
    cpu_end: float


def simulation(folder: Path) -> Workload:
    """512 responses of 128 tokens, one step off, two rollout workers; the models are there to be named alone."""
    policy = {
        "staleness": 1,
        "importance_cap": 2.0,
        "num_rollout_workers": 2,
        "parity_every": 0,
        "batch_size": 512,
        "max_new_tokens": 128,
    }
    folder.mkdir(parents=True)
    return make_workload(folder, TINY, topology="shared_trunk", policy=policy)


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Steps of the loop, the first two left out."""

    rows: list[dict[str, float]]
    """What the loop wrote down of each."""
    idle_shares: list[float]
    """By the learner's clock: of the time from an update's end to the next one's end, the part before its begin."""
    cpu_s: tuple[float, float]
    """CPU seconds of a step: of the learner's process between two updates, and of the loop's thread (some of it beside
    the update). On a machine to itself their sum is about what the learner waits; on a busy one wall times say little
    and these hold."""

    @property
    def idle_share(self) -> float:
        return statistics.median(self.idle_shares)


def idle_shares(updates: Sequence[Update]) -> list[float]:
    return [(b.begin - a.end) / (b.end - a.end) for a, b in itertools.pairwise(updates)]


def report(simulated: Simulated) -> float:
    """Prints where the steps went; returns the learner's idle share."""
    rows, shares = simulated.rows, sorted(simulated.idle_shares)

    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    print(
        f"actors that sleep ({len(rows)} steps, 512 responses of 128 tokens, {WEIGHT_BYTES / 1e6:.0f} MB of weights): "
        f"idle {simulated.idle_share:.1%} ({shares[0]:.1%} to {shares[-1]:.1%}; the loop says "
        f"{median('learner_idle_share'):.1%}); step {median('seconds_step'):.3f} s: update "
        f"{median('seconds_update'):.3f} s (asleep {UPDATE_S}), waited for rollouts "
        f"{median('seconds_wait_rollouts'):.3f} s; beside it new weights {median('seconds_refresh'):.3f} s, generation "
        f"{median('seconds_generate'):.3f} s, scores {median('seconds_score'):.3f} s; CPU time: learner "
        f"between updates {simulated.cpu_s[0]:.3f} s, loop {simulated.cpu_s[1]:.3f} s; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return simulated.idle_share


def simulate(workload: Workload, num_steps: int) -> Simulated:
    """Runs the loop. The workload's config must be one step off."""
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
        clock = work / "clock.jsonl"
        for name, make in (
            ("jobs.arm.spawn_ppo_learner", _spawner(SleepingLearner, clock)),
            ("actors.rollout_pool.spawn_rollout_worker", _spawner(SleepingWorker)),
        ):
            stack.enter_context(mock.patch(name, make))
        panel: Any = SleepingPanel()
        bar: Any = NoBar()
        arm = Arm(context, arm_config, work, panel)
        run_arm(arm, bar, PrometheusGauges(), threading.Event())
    rows = _read_lines(context.path("timings", f"policy-{arm_config.name}.jsonl"))
    updates = [Update(*row) for row in _read_lines(clock)[1:]]
    learner = [b.cpu_begin - a.cpu_end for a, b in itertools.pairwise(updates)]
    loop = [b - a for a, b in itertools.pairwise(bar.cpu[2:])]
    cpu_s = (statistics.median(learner), statistics.median(loop))
    return Simulated(rows[2:], idle_shares(updates), cpu_s)


def _read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _spawner(plain_class: type[Any], *arguments: Any) -> Any:
    def make(*_: Any, **__: Any) -> Any:
        return spawn(plain_class, *arguments, num_cpus=0.1, num_gpus=0)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    prepare_environment()  # before ray is imported
    with tempfile.TemporaryDirectory(prefix="morlaif-overlap-") as scratch:
        idle = report(simulate(simulation(Path(scratch) / "run"), options.steps))
    figures = {"learner_idle_share_simulated": round(idle, 3)}
    print(json.dumps(figures | {"load_at_end": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
