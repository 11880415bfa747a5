"""`ray job submit` against a head node with dashboard and token authentication that this test starts and ends."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.jobs.commands import (
    ROOT,
    FinishedRun,
    clean_environment,
    differing,
    small,
    without_stages,
)
from tests.ports import free_ports

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(2400)]
START_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 900.0
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    gcs: str
    dashboard: str
    token: str

    def environment(self, **changes: str) -> dict[str, str]:
        """What a person sets to talk to this cluster."""
        return clean_environment() | {
            "RAY_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            **changes,
        }


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = tempfile.mkdtemp(prefix="mh-", dir="/tmp")  # Ray's socket paths must be short
    gcs, dashboard, client, agent, metrics = free_ports(5)
    found = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", secrets.token_hex(32))
    ports = {
        "port": gcs,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "metrics-export-port": metrics,
    }
    environment = found.environment()
    del environment["RAY_ADDRESS"]
    environment["PATH"] = (
        f"{RAY.parent}:{environment['PATH']}"  # the entry point says just `python`
    )
    with Path(folder, "head.log").open("wb") as log:
        process = subprocess.Popen(
            [
                str(RAY),
                "start",
                "--head",
                "--block",
                "--num-cpus=4",
                "--object-store-memory=200000000",
                "--dashboard-host=127.0.0.1",
                f"--temp-dir={folder}",
                *(f"--{name}={port}" for name, port in ports.items()),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_dashboard(found, process)
        yield found
    finally:
        family = [
            process.pid,
            *(p.pid for p in psutil.Process(process.pid).children(recursive=True)),
        ]
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)
        ours = [psutil.Process(pid) for pid in family if psutil.pid_exists(pid)]
        for left in psutil.wait_procs(ours, timeout=10)[1]:
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_dashboard(head: Head, process: subprocess.Popen[bytes]) -> None:
    request = urllib.request.Request(
        f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, "the head node ended"
            assert time.monotonic() < deadline, "the dashboard did not start"
            time.sleep(0.2)


def submit(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(RAY), "job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=JOB_TIMEOUT_S,
        check=False,
    )


def test_a_submitted_job_uses_the_clusters_ray_and_leaves_the_same_results(
    head: Head, finished_run: FinishedRun, run_copy: Path
) -> None:
    without_stages(run_copy, "1_pairs", "4_sweep", "5_policy", "6_evaluation")
    arguments = [word.replace(str(ROOT) + "/", "") for word in small(run_copy)]
    done = submit(arguments, head.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attaching to Ray at" in done.stdout
    assert "starting a local Ray" not in done.stdout
    assert str(run_copy / "report.html") in done.stdout
    assert differing(run_copy, finished_run.run_dir) == []


def test_a_job_that_fails_shows_its_one_line(head: Head, tmp_path: Path) -> None:
    arguments = ["run", "--config", "configs/smoke.yaml", "--run-dir", str(tmp_path / "run")]
    done = submit([*arguments, "--set", "policy.num_rollout_workers=9"], head.environment())
    assert done.returncode == 1
    assert "error: 5_policy needs " in done.stdout
    assert "there are 4; reduce policy.concurrent_arms or policy.num_rollout_workers" in done.stdout
    assert not (tmp_path / "run" / "0_sft").exists()


def test_without_the_token_nothing_is_submitted(head: Head, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    environment = head.environment(HOME=str(tmp_path / "home"))
    del environment["RAY_AUTH_TOKEN"]
    done = submit(["--help"], environment)
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()
    done = submit(["--help"], head.environment(RAY_AUTH_TOKEN="f" * 64))
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()
