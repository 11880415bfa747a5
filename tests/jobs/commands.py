"""Runs `morlaif` the way a person does: as a process, with a clean environment; and signals it on time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from morlaif_ray.artifacts import STAGES

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
NUM_STEPS = 12
SETTINGS = (
    "data.source.num_prompts=500",
    "sft.num_steps=30",
    "sft.checkpoint_every=10",
    f"policy.num_steps={NUM_STEPS}",
    "policy.batch_size=8",
    "policy.checkpoint_every=2",
    "evaluation.num_prompts=16",
    "evaluation.num_bootstrap=100",
    "sweep.num_offline_samples=2",
)
TIMEOUT_S = 1200.0
"""For one process. The longest takes a minute on two free cores; CI's may be slow and busy."""
RECORD = "finished.json"


def small(run_dir: Path, *extra: str, verb: str = "run") -> list[str]:
    """Arguments of `morlaif` for the smallest whole run."""
    return [verb, "--config", str(SMOKE), "--run-dir", str(run_dir), *setting(*SETTINGS), *extra]


def setting(*settings: str) -> list[str]:
    return [word for item in settings for word in ("--set", item)]


def clean_environment() -> dict[str, str]:
    """Nothing that points at another Ray; the checkout on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Ended:
    """How a command ended that was refused."""

    code: int
    error: str
    """The line after `error: `."""


class Running:
    """A `morlaif` process in a process group of its own. Lines of stderr are kept with their time of arrival."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        self.started = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *arguments],
            cwd=ROOT,
            env=environment or clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.stdout = ""
        self._readers = [
            threading.Thread(target=read, daemon=True)
            for read in (self._read_lines, self._read_all)
        ]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append((time.monotonic() - self.started, line.rstrip("\n")))

    def _read_all(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            self.stdout = stream.read()

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def wait_until(
        self, condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Looks at the run folder every few milliseconds: the run itself sends no events."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.text}"
            assert time.monotonic() < deadline, f"not {what} after {timeout_s:.0f} s:\n{self.text}"
            time.sleep(0.01)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def interrupt(self, number: signal.Signals, *, whole_group: bool = False) -> None:
        """`whole_group`: as a terminal's Ctrl-C does."""
        if whole_group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def end(self, timeout_s: float = TIMEOUT_S) -> int:
        """Waits for the end; the exit code."""
        try:
            code = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s:.0f} s:\n{self.text}") from None
        for reader in self._readers:
            reader.join(timeout=5.0)
        return code


def left_over(processes: list[psutil.Process], timeout_s: float = 240.0) -> list[str]:
    """Names of those still alive after the wait."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [process.name() for process in alive]


@dataclass(frozen=True)
class FinishedRun:
    """A whole run that ended well."""

    run_dir: Path
    lines: list[tuple[float, str]]
    """(seconds since the start, line of stderr)."""
    stdout: str
    left_over: list[str]
    """Processes of the run that outlived it."""

    def write(self, folder: Path) -> FinishedRun:
        """For another process of this test session; returns itself."""
        record = {**dataclasses.asdict(self), "run_dir": str(self.run_dir)}
        (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
        return self

    @classmethod
    def read(cls, folder: Path) -> FinishedRun | None:
        """What `write` left there, if anything."""
        if not (folder / RECORD).is_file():
            return None
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        lines = [(float(seconds), str(line)) for seconds, line in record["lines"]]
        return cls(Path(record["run_dir"]), lines, record["stdout"], record["left_over"])


def run_small(run_dir: Path) -> FinishedRun:
    running = Running(small(run_dir))
    family: dict[int, psutil.Process] = {}

    def ended() -> bool:
        if running.process.poll() is None:
            family.update({child.pid: child for child in running.descendants()})
            return False
        return True

    while not ended():
        time.sleep(0.5)
    code = running.end()
    assert code == 0, running.text
    gone = left_over(list(family.values()))
    return FinishedRun(run_dir, running.lines, running.stdout, gone)


def without_stages(run_dir: Path, *stages: str) -> Path:
    """The run folder as it was before these stages."""
    for stage in stages:
        shutil.rmtree(run_dir / stage)
    (run_dir / "report.html").unlink(missing_ok=True)
    return run_dir


def file_hashes(run_dir: Path) -> dict[str, str]:
    """Path -> hash of everything that is published."""
    roots = [run_dir / name for name in (*STAGES, "config.yaml", "report.html")]
    files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*"))]
    return {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if path.is_file()
    }


def differing(left: Path, right: Path) -> list[str]:
    """Published files that two runs do not have in common, bit for bit."""
    a, b = file_hashes(left), file_hashes(right)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
