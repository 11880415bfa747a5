"""The two sides of the PPO benchmark, each advanced one step at a time, so that they can be measured in turns.

Ours is the loop that users get: `jobs.train_policy.run_arm` with its Ray actors. Theirs is trl's PPOTrainer in its own
environment and process. While one steps the other waits and uses no processor.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.ppo_workload import SETTINGS, Workload

ROOT = Path(__file__).parents[1]
STEP_TIMEOUT_S = 3600.0
LEARNER_PROCESS = "ray::PPOLearner"
"""How Ray begins the names of the learner's processes."""
NOT_A_PHASE = ("seconds_step", "seconds_wait_rollouts")
"""Sums over phases, and waits for one."""


@dataclass
class Measured:
    """Steps of one side. Seconds; the first step (warm-up) is not among them."""

    name: str
    seconds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    response_tokens: list[float] = field(default_factory=list)

    def add(self, step: dict[str, Any]) -> None:
        self.seconds.append(step["seconds"])
        self.phases.append(step["phases"])
        self.response_tokens.append(step["response_tokens"])

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    def phase(self, name: str) -> float:
        return statistics.median(phases.get(name, 0.0) for phases in self.phases)

    @property
    def phase_names(self) -> list[str]:
        return list(dict.fromkeys(name for phases in self.phases for name in phases))


class OurSide:
    """`run_arm` in a thread. `step()` lets it take one step; `close()` ends Ray."""

    def __init__(self, workload: Workload, name: str = "ours") -> None:
        from actors.preference_panel import PreferencePanel, panel_columns
        from jobs.arm import Arm
        from jobs.context import open_run
        from jobs.progress import Reporter
        from jobs.tracking import PrometheusGauges
        from jobs.train_policy import run_arm

        self.measured = Measured(name)
        self._gate = _Gate()
        context = open_run(workload.config, workload.folder, Reporter(quiet=True))
        context.connect()
        columns = panel_columns(context.path("3_preference_models"), [])
        self._panel = PreferencePanel(context.config, columns, print)
        work = context.path("work", "5_policy", "ours")
        self.arm = Arm(context, context.config.policy.arms[0], work, self._panel)
        self._failure: BaseException | None = None
        self._ended = False
        self._stop = threading.Event()

        def train() -> None:
            try:
                run_arm(self.arm, self._gate, PrometheusGauges(), self._stop)
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
                self._failure = error
            finally:
                self._ended = True
                self._gate.fail()

        self._thread = threading.Thread(target=train, daemon=True)
        self._thread.start()
        self._gate.wait_for_step()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"our side ended: {self._failure}") from self._failure
        if self._ended:
            raise RuntimeError("our side ended: policy.num_steps is reached")

    def step(self, *, warm_up: bool = False) -> None:
        started = time.perf_counter()
        self._gate.go()
        self._gate.wait_for_step()
        self._check()
        seconds = time.perf_counter() - started
        phases = {
            name.removeprefix("seconds_"): value
            for name, value in self.arm.seconds.items()
            if name.startswith("seconds_") and name not in NOT_A_PHASE
        }
        # One step off, phases lie beside one another and there is no rest to speak of.
        phases["rest"] = max(0.0, seconds - sum(phases.values()))
        log = self.arm.work / "metrics.jsonl"
        row = json.loads(last_line(log))
        tokens = row["response_length_mean"] * self.arm.context.config.policy.batch_size
        if not warm_up:
            self.measured.add({"seconds": seconds, "phases": phases, "response_tokens": tokens})

    def learner_peak_gb(self) -> float:
        """Highest resident memory of a learner's process so far, without the object store's pages that it touched:
        `plan` counts these once, as `cluster.object_store_mb` (Linux: VmHWM - RssShmem, which only grows)."""
        peaks = []
        for process in psutil.Process().children(recursive=True):
            if " ".join(process.cmdline()).startswith(LEARNER_PROCESS):
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
                kb = {key: rest.split()[0] for key, _, rest in _fields(status)}
                peaks.append((int(kb["VmHWM"]) - int(kb["RssShmem"])) * 1024 / 2**30)
        return max(peaks)

    def close(self) -> None:
        from actors.session import disconnect

        self._stop.set()
        self._gate.open()
        self._thread.join(timeout=120.0)
        self._panel.close()
        disconnect()


def _fields(status: str) -> list[tuple[str, str, str]]:
    """`Name: value` lines of /proc/<pid>/status that have a value."""
    return [line.partition(":") for line in status.splitlines() if line.partition(":")[2].strip()]


def last_line(path: Path, longest: int = 65_536) -> bytes:
    """Of a file that grows with every step, whose whole text would show up in the memory that is measured here."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - longest))
        return stream.read().splitlines()[-1]


class _Gate:
    """Stands in for a progress bar: the loop's `advance` after each step waits here for permission to go on."""

    def __init__(self) -> None:
        self._go = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._free = False

    def advance(self, amount: int = 1) -> None:
        self._done.release()
        if not self._free:
            self._go.acquire()

    def note(self, text: str) -> None: ...

    def go(self) -> None:
        self._go.release()

    def open(self) -> None:
        self._free = True
        self._go.release()

    def fail(self) -> None:
        self._done.release()

    def wait_for_step(self) -> None:
        if not self._done.acquire(timeout=STEP_TIMEOUT_S):
            raise RuntimeError(f"our side took no step in {STEP_TIMEOUT_S:.0f} s")


class PeerSide:
    """TRL's trainer in a process of its own environment."""

    def __init__(
        self, python: Path, workload: Workload, settings: dict[str, Any], name: str = "trl 1.12"
    ) -> None:
        self.measured = Measured(name)
        merged = {
            **SETTINGS,
            "rollout_batch_size": SETTINGS["batch_size"],
            "threads": None,
            "bf16": False,
            "reward_dtype": "float32",
            "lora_rank": None,
            "max_steps": 1000,
            "seed": 0,
            "output_dir": str(workload.folder / "peer"),
            **settings,
        }
        path = workload.folder / f"peer-{name.replace(' ', '-')}.json"
        path.write_text(json.dumps(merged), encoding="utf-8")
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RAY_", "OMP_", "MKL_"))
        }
        environment["PYTHONPATH"] = str(ROOT)
        self._log = (workload.folder / f"peer-{name.replace(' ', '-')}.log").open("wb")
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.trl_ppo", str(workload.folder), str(path)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.threads = self._read()["threads"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.flush()
            tail = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-8:]
            raise RuntimeError(f"the peer ended with exit code {code}:\n" + "\n".join(tail))
        message: dict[str, Any] = json.loads(line)
        return message

    def step(self, *, warm_up: bool = False) -> dict[str, Any]:
        """One PPO step; the peer's answer, which also holds its reward and KL."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._read()
        if not warm_up:
            self.measured.add(answer)
        return answer

    def peak_gb(self) -> float:
        return psutil.Process(self._process.pid).memory_info().rss / 2**30

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()
