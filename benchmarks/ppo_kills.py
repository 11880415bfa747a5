"""SIGKILL at random moments of a PPO run: the final policy must be the undisturbed run's, byte for byte.

    python -m benchmarks.ppo_kills [--runs 10] [--kills 3] [--steps 40] [--seed 0] [--keep DIR]

One undisturbed run of the smoke config gives the reference and the stages before PPO. Each further run starts from
those stages, trains again, and meanwhile loses processes: at random steps, after a random delay, a rollout worker, a
preference model, the learner or the driver itself (which is then started again with the same command). Everything
about the kills is a function of the seed. Last line: one JSON object; exit code 1 where a byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "smoke.yaml"
STAGE = "5_policy"
AFTER = (STAGE, "6_evaluation")
VICTIMS = {
    "rollout worker": "ray::RolloutWorker",
    "preference model": "ray::PreferenceModelActor",
    "learner": "ray::PPOLearner",
    "driver": None,
}
"""Whom to kill -> how Ray begins the name of its process."""
LONGEST_DELAY_S = 1.0
FIND_TIMEOUT_S = 60.0
RUN_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: once an arm has done `step` steps, `delay_s` later."""

    step: int
    delay_s: float
    victim: str


@dataclass
class Outcome:
    """What became of one disturbed run."""

    seed: int
    done: list[str] = field(default_factory=list)
    """Kills that happened."""
    missed: list[str] = field(default_factory=list)
    """Kills that came too late: the run had ended, or there was no such process."""
    differing: list[str] = field(default_factory=list)
    """Files of the stage that are not the undisturbed run's."""
    exit_code: int = 0
    seconds: float = 0.0

    @property
    def is_same(self) -> bool:
        return self.exit_code == 0 and not self.differing


def plan_kills(seed: int, num_kills: int, num_steps: int) -> list[Kill]:
    """Random steps, delays and victims, in order of steps; a function of its arguments alone."""
    rng = random.Random(f"kills {seed}")
    kills = [
        Kill(
            rng.randrange(0, max(1, num_steps - 1)),
            rng.uniform(0.0, LONGEST_DELAY_S),
            rng.choice(list(VICTIMS)),
        )
        for _ in range(num_kills)
    ]
    return sorted(kills, key=lambda kill: (kill.step, kill.delay_s))


class Training:
    """`morlaif <verb>` as a process; its log in a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs", *arguments],
                cwd=ROOT,
                env={**kept, "PYTHONPATH": str(ROOT)},
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def find(self, title: str) -> psutil.Process | None:
        """A process of the run whose title begins so."""
        for process in self.family():
            try:
                if " ".join(process.cmdline()).startswith(title):
                    return process
            except psutil.Error:
                continue
        return None

    def end(self) -> int:
        try:
            return self.process.wait(timeout=RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for process in [*self.family(), psutil.Process(self.process.pid)]:
                process.kill()
            return -1


def disturbed_run(
    run_dir: Path, arguments: list[str], kills: list[Kill], reference: dict[str, str], seed: int = 0
) -> Outcome:
    """Trains in `run_dir` (stages before PPO published) under these kills, and compares the stage with `reference`."""
    outcome = Outcome(seed)
    started = time.monotonic()
    command = ["train_policy", *arguments, "--run-dir", str(run_dir)]
    log = run_dir.with_suffix(".log")
    training = Training(command, log)
    for kill in kills:
        shown = f"{kill.victim} at step {kill.step} + {kill.delay_s:.2f} s"
        if not _wait_for_step(training, run_dir, kill.step):
            outcome.missed.append(shown)
            continue
        time.sleep(kill.delay_s)
        if _strike(training, kill.victim):
            outcome.done.append(shown)
        else:
            outcome.missed.append(shown)
        if kill.victim == "driver" and training.process.wait(timeout=30.0) != 0:
            training = Training(command, log)
    outcome.exit_code = training.end()
    outcome.seconds = time.monotonic() - started
    ours = stage_hashes(run_dir)
    names = sorted(ours.keys() | reference.keys())
    outcome.differing = [name for name in names if ours.get(name) != reference.get(name)]
    return outcome


def _strike(training: Training, victim: str) -> bool:
    title = VICTIMS[victim]
    if title is None:
        training.process.send_signal(signal.SIGKILL)
        return True
    deadline = time.monotonic() + FIND_TIMEOUT_S
    while time.monotonic() < deadline and training.process.poll() is None:
        process = training.find(title)
        if process is not None:
            process.kill()
            return True
        time.sleep(0.02)
    return False


def _wait_for_step(training: Training, run_dir: Path, step: int) -> bool:
    """True once an arm has done so many steps while the run goes on."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while time.monotonic() < deadline and training.process.poll() is None:
        logs = (run_dir / "work" / STAGE).glob("*/metrics.jsonl")
        if max((log.read_bytes().count(b"\n") for log in logs), default=-1) >= step:
            return True
        time.sleep(0.01)
    return False


def stage_hashes(run_dir: Path) -> dict[str, str]:
    """File -> hash of the published PPO stage."""
    folder = run_dir / STAGE
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def without_results(run_dir: Path, target: Path) -> Path:
    """A copy of a run as it was before PPO."""
    shutil.copytree(run_dir, target)
    for stage in AFTER:
        shutil.rmtree(target / stage, ignore_errors=True)
    (target / "report.html").unlink(missing_ok=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3, help="kills of each run")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="keep run folders and logs here")
    options = parser.parse_args()
    scratch = (options.keep or Path(tempfile.mkdtemp(prefix="morlaif-kills-"))).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        outcomes = _all_runs(options, scratch)
    finally:
        if options.keep is None:
            shutil.rmtree(scratch, ignore_errors=True)
    figures = {
        "runs": len(outcomes),
        "same_bytes": sum(outcome.is_same for outcome in outcomes),
        "kills": sum(len(outcome.done) for outcome in outcomes),
        "missed_kills": sum(len(outcome.missed) for outcome in outcomes),
    }
    print(json.dumps(figures))
    if figures["same_bytes"] != figures["runs"]:
        raise SystemExit(1)


def _all_runs(options: argparse.Namespace, scratch: Path) -> list[Outcome]:
    settings = [
        "data.source.num_prompts=500",
        "sft.num_steps=30",
        f"policy.num_steps={options.steps}",
        "policy.batch_size=8",
        "policy.checkpoint_every=3",
        f"policy.max_restarts={options.kills}",
        "evaluation.num_prompts=16",
        "evaluation.num_bootstrap=100",
        "sweep.num_offline_samples=2",
    ]
    arguments = ["--config", str(CONFIG), *(w for s in settings for w in ("--set", s))]
    reference_dir = scratch / "undisturbed"
    first = Training(
        ["run", *arguments, "--run-dir", str(reference_dir)], scratch / "undisturbed.log"
    )
    if first.end() != 0:
        tail = (scratch / "undisturbed.log").read_text(errors="replace").splitlines()[-5:]
        raise SystemExit("the undisturbed run failed:\n" + "\n".join(tail))
    reference = stage_hashes(reference_dir)
    print(f"undisturbed: {len(reference)} files, {options.steps} steps of each arm", flush=True)
    outcomes = []
    for index in range(options.runs):
        seed = options.seed + index
        run_dir = without_results(reference_dir, scratch / f"run{seed}")
        kills = plan_kills(seed, options.kills, options.steps)
        outcome = disturbed_run(run_dir, arguments, kills, reference, seed)
        outcomes.append(outcome)
        verdict = "same bytes" if outcome.is_same else f"DIFFERS: {outcome.differing}"
        print(
            f"seed {seed}: exit {outcome.exit_code}, {verdict}, {outcome.seconds:.0f} s; killed "
            f"{'; '.join(outcome.done) or 'nothing'}"
            + (f"; too late: {'; '.join(outcome.missed)}" if outcome.missed else ""),
            flush=True,
        )
        if options.keep is None:
            shutil.rmtree(run_dir)
    return outcomes


if __name__ == "__main__":
    main()
