"""Ray for one job: attach to a cluster, or start a local one that ends with the job.

Token authentication is always on. A local Ray gets a fresh token in a file of mode 0600 that only this process and its
children know of. Ray's and the workers' log lines go to files, not to the person's terminal.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from actors.allocation import limit_arenas
from morlaif_ray.config.operations import ClusterConfig
from morlaif_ray.errors import ResourceError

WORKER_ENVIRONMENT = {
    # One thread per process: on a small machine two threads that contend are 2-5 times slower than one.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DEDUP_LOGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Ctrl-C must end the job, not only the Tune experiment that happens to run.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}

SESSION_ROOT = "/tmp" if os.name == "posix" else tempfile.gettempdir()
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
HTTP2_SETTINGS = b"\x04"
"""Type of the frame that every HTTP/2 server, so every gRPC server, sends first."""
SESSION_PREFIX = "morlaif-"
OWNER = "pid"
START_ATTEMPTS = 3


def prepare_environment() -> None:
    """Sets what Ray and its workers read from the environment.

    Ray reads the authentication mode when it is imported, so call this first; where Ray is already imported its own
    default (a token for local clusters) stays in force.
    """
    limit_arenas()
    for name, value in WORKER_ENVIRONMENT.items():
        if name == "RAY_AUTH_MODE" and "ray" in sys.modules:
            continue
        os.environ.setdefault(name, value)


def connect(cluster: ClusterConfig, log_dir: Path, say: Callable[[str], None]) -> None:
    """Attaches to `cluster.address` (or RAY_ADDRESS), else starts a local Ray. ResourceError when neither works."""
    prepare_environment()
    import ray

    if ray.is_initialized():
        return
    _quiet_loggers()
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    with _keeping_sigterm():
        if address:
            _attach(address, cluster, say)
        else:
            _start_local(cluster, log_dir, say)


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """`ray.init` takes SIGTERM for itself and ends the process at once; ours lets the job write a checkpoint first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _attach(address: str, cluster: ClusterConfig, say: Callable[[str], None]) -> None:
    import ray

    check_reachable(address, cluster.connect_timeout_s)
    say(f"attaching to Ray at {address}")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise ResourceError(
            f"Ray at {address} did not accept this driver ({_first_line(error)}); check RAY_AUTH_TOKEN or "
            f"RAY_AUTH_TOKEN_PATH, and that both sides run Ray {ray.__version__}"
        ) from error


def check_reachable(address: str, timeout_s: float) -> None:
    """Says hello to the gRPC server at the address, because Ray's own error comes late and misleads, or never."""
    if address in ("auto", "local"):
        return
    plain = address.removeprefix("ray://")
    host, _, port = plain.rpartition(":")
    if not host or not port.isdigit():
        raise ResourceError(f"Ray address {address!r}: write it as host:port, e.g. 10.0.0.5:6379")
    try:
        with socket.create_connection(
            (host, int(port)), timeout=min(timeout_s, 10.0)
        ) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(HTTP2_HELLO)
            with connection.makefile("rb") as stream:
                answer = _first_bytes(stream)
    except OSError as error:
        raise ResourceError(
            f"no Ray at {address} ({error.strerror or error}); start one with 'ray start --head', or unset "
            f"cluster.address and RAY_ADDRESS to use a local Ray"
        ) from None
    if answer[3:4] != HTTP2_SETTINGS:
        raise ResourceError(
            f"what listens at {address} is not Ray; give the address that 'ray start --head' printed (port 6379 "
            f"unless chosen otherwise, not the dashboard's)"
        )


def _first_bytes(stream: BinaryIO) -> bytes:
    """Header of the first frame; empty where nothing comes in time."""
    try:
        return stream.read(9)
    except TimeoutError:
        return b""


def _start_local(cluster: ClusterConfig, log_dir: Path, say: Callable[[str], None]) -> None:

    say("starting a local Ray")
    _remove_orphans()
    # Socket paths are limited to 107 bytes, so the session folder cannot live in the run folder. Mode 0700: Ray opens
    # its own folder below to everyone.
    session_dir = Path(tempfile.mkdtemp(prefix=SESSION_PREFIX, dir=SESSION_ROOT))
    (session_dir / OWNER).write_text(str(os.getpid()), encoding="utf-8")
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        token = session_dir / "token"
        descriptor = os.open(token, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    try:
        start_ray(
            num_cpus=cluster.num_cpus,
            include_dashboard=cluster.dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=cluster.object_store_mb * 1024 * 1024,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(session_dir / "ray"),
        )
    except Exception as error:
        shutil.rmtree(session_dir, ignore_errors=True)
        raise ResourceError(
            f"the local Ray did not start ({_first_line(error)}); see 'morlaif doctor'"
        ) from error
    atexit.register(_end_local, session_dir, log_dir)


def start_ray(**options: Any) -> None:
    """`ray.init`, tried again where a busy machine did not bring its processes up within the 30 s that Ray waits."""
    import ray

    for attempts_left in reversed(range(START_ATTEMPTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:
            if not attempts_left or "timed out" not in str(error).lower():
                raise
            ray.shutdown()


def _remove_orphans() -> None:
    """Session folders of jobs that were killed and could not clean up after themselves."""
    for folder in Path(SESSION_ROOT).glob(f"{SESSION_PREFIX}*"):
        try:
            owner = int((folder / OWNER).read_text(encoding="utf-8"))
            os.kill(owner, 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):
            continue  # another person's, or not a session folder


def _end_local(session_dir: Path, log_dir: Path) -> None:
    """Ends our own Ray, keeps its logs in the run folder, removes the session folder."""
    import ray

    ray.shutdown()
    logs = session_dir / "ray" / "session_latest" / "logs"
    if logs.is_dir() and log_dir.is_dir():
        target = log_dir / "ray"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(logs.resolve(), target, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    shutil.rmtree(session_dir, ignore_errors=True)
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)


def disconnect() -> None:
    """Ends the local Ray or detaches, for callers that go on after the job (tests)."""
    import ray

    ray.shutdown()


def _quiet_loggers() -> None:
    for name in ("ray", "transformers", "datasets", "httpx", "httpx2", "openai"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("ray.tune", "ray.train", "ray.air"):  # the traceback of what we raise as one line
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
